//! Progress of loading: bars on a terminal, plain lines elsewhere.

use anyhow::{Context, Result, bail};
use coordinator::api::view::{ClusterView, Phase};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use tokio::sync::watch;

/// Follows the cluster until it serves, showing what it does. The first plan or load that fails is an error: on one host
/// nothing will be different at the next try.
pub async fn until_serving(mut view: watch::Receiver<ClusterView>) -> Result<()> {
    let bars = MultiProgress::new();
    let mut shown: BTreeMap<String, ProgressBar> = BTreeMap::new();
    let mut said = None;
    loop {
        {
            let now = view.borrow_and_update();
            if now.phase == Phase::Serving {
                // A terminal that can't be cleared shows old bars, no more.
                let _ = bars.clear();
                return Ok(());
            }
            if now.failures > 0 {
                let _ = bars.clear();
                bail!("{}", now.reasons.join("; "));
            }
            if std::io::stderr().is_terminal() {
                draw(&bars, &mut shown, &now);
            }
            // Elsewhere a line a phase: who joins when is of no use in a log.
            if !std::io::stderr().is_terminal() && said != Some(now.phase) {
                said = Some(now.phase);
                eprintln!("{}", now.reasons.join("; "));
            }
        }
        view.changed().await.context("the coordinator ended")?;
    }
}

fn draw(bars: &MultiProgress, shown: &mut BTreeMap<String, ProgressBar>, view: &ClusterView) {
    for member in &view.members {
        let bar = shown.entry(member.id.clone()).or_insert_with(|| {
            let style = ProgressStyle::with_template("  {prefix:12} {bar:30} {msg}").expect("the template is valid");
            bars.add(ProgressBar::new(100).with_style(style).with_prefix(member.id.clone()))
        });
        let percent = member.phase.strip_prefix("loading ").and_then(|p| p.trim_end_matches('%').parse().ok());
        bar.set_position(if member.phase == "ready" { 100 } else { percent.unwrap_or(0) });
        bar.set_message(member.phase.clone());
    }
}
