//! `conclave preflight`: what this host can do and what is missing, each in one line.

use anyhow::{Result, bail};
use worker::preflight::{Report, Standing, look};

#[derive(clap::Args)]
pub struct Args {
    /// Fail unless ranks can run on this: auto, cpu or cuda
    #[arg(long, default_value = "auto", value_parser = ["auto", "cpu", "cuda"])]
    backend: String,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let report = look();
    let verdict = verdict(&report, &args.backend);
    if args.json {
        let runs = serde_json::json!({"cpu": true, "cuda": report.cuda.is_none()});
        let whole =
            serde_json::json!({"lines": report.lines, "runs": runs, "asked": args.backend, "ok": verdict.is_ok()});
        println!("{whole:#}");
    } else {
        print!("{}", table(&report));
        println!("{}", conclusion(&report));
    }
    verdict
}

fn verdict(report: &Report, backend: &str) -> Result<()> {
    match (&report.cuda, backend) {
        (Some(why), "cuda") => bail!("no rank can run on a GPU here: {why}"),
        _ => Ok(()),
    }
}

fn conclusion(report: &Report) -> String {
    match &report.cuda {
        None => "ranks can run on GPUs and on this host's cores".into(),
        Some(_) => "ranks can run on this host's cores, not on GPUs".into(),
    }
}

fn table(report: &Report) -> String {
    let line = |line: &worker::preflight::Line| {
        let mark = match line.standing {
            Standing::Has => "has",
            Standing::Note => "note",
            Standing::Lacks => "lacks",
        };
        format!("{mark:<6} {:<16} {}\n", line.what, line.text)
    };
    report.lines.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use worker::preflight::Line;

    fn report(cuda: Option<&str>) -> Report {
        let line = Line { what: "cuda".into(), standing: Standing::Lacks, text: "no driver".into() };
        Report { lines: vec![line], cuda: cuda.map(str::to_string) }
    }

    #[test]
    fn only_what_was_asked_fails() {
        let without = report(Some("cuda: no driver"));
        assert!(verdict(&without, "auto").is_ok() && verdict(&without, "cpu").is_ok());
        let text = verdict(&without, "cuda").unwrap_err().to_string();
        assert_eq!(text, "no rank can run on a GPU here: cuda: no driver");
        assert!(verdict(&report(None), "cuda").is_ok());
        assert_eq!(table(&without), "lacks  cuda             no driver\n");
    }
}
