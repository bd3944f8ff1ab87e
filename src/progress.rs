//! Progress of loading: bars on a terminal, plain lines elsewhere.

use coordinator::api::view::{ClusterView, Phase};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use tokio::sync::watch;

/// Follows the cluster until it serves, showing what it does. `false` if the coordinator ended before.
pub async fn until_serving(mut view: watch::Receiver<ClusterView>) -> bool {
    let bars = MultiProgress::new();
    let mut shown: BTreeMap<String, ProgressBar> = BTreeMap::new();
    let mut said = String::new();
    loop {
        {
            let now = view.borrow_and_update();
            if now.phase == Phase::Serving {
                bars.clear().unwrap_or_default();
                return true;
            }
            if std::io::stderr().is_terminal() {
                draw(&bars, &mut shown, &now);
            }
            let line = now.reasons.join("; ");
            if line != said && !line.is_empty() {
                said.clone_from(&line);
                // A bar's own line shows this on a terminal too.
                let _ = bars.println(&line);
                if !std::io::stderr().is_terminal() {
                    eprintln!("{line}");
                }
            }
        }
        if view.changed().await.is_err() {
            return false;
        }
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
