//! All groups as one cluster: it serves while one of them does.

use crate::api::view::{ClusterView, GroupView, LoadView, Phase};

/// Joins the views of a cluster's groups. Of one alone, its own.
pub fn join(views: &[ClusterView]) -> ClusterView {
    let [first, others @ ..] = views else { return ClusterView::default() };
    if others.is_empty() {
        return first.clone();
    }
    // The one that is furthest speaks for all.
    let best = views.iter().rev().max_by_key(|view| progress(view.phase)).expect("there is one");
    let serving = || views.iter().filter(|view| view.phase == Phase::Serving);
    let named = |n: usize, text: &str| format!("group {n}: {text}");
    let lines = |pick: fn(&ClusterView) -> Vec<String>| -> Vec<String> {
        views.iter().enumerate().flat_map(|(n, view)| pick(view).into_iter().map(move |text| named(n, &text))).collect()
    };
    let plans = views.iter().enumerate().filter(|(_, view)| !view.plan.is_empty());
    let count = views.len() as f64;
    ClusterView {
        mesh: lines(|view| Some(view.mesh.clone()).filter(|mesh| !mesh.is_empty()).into_iter().collect()).join("; "),
        plan: plans.map(|(n, view)| named(n, &view.plan)).collect::<Vec<_>>().join("\n"),
        members: views.iter().flat_map(|view| view.members.clone()).collect(),
        reasons: if best.phase == Phase::Serving { Vec::new() } else { lines(|view| view.reasons.clone()) },
        load: LoadView {
            running: views.iter().map(|view| view.load.running).sum(),
            waiting: views.iter().map(|view| view.load.waiting).sum(),
            cache_used: views.iter().map(|view| view.load.cache_used).sum::<f64>() / count,
        },
        failures: views.iter().map(|view| view.failures).min().unwrap_or(0),
        // What every group can take.
        model_len_max: serving().map(|view| view.model_len_max).min().unwrap_or(best.model_len_max),
        progress: serving().filter_map(|view| view.progress).max(),
        groups: views.iter().map(group).collect(),
        ..best.clone()
    }
}

fn group(view: &ClusterView) -> GroupView {
    GroupView {
        phase: view.phase,
        epoch: view.epoch,
        mesh: view.mesh.clone(),
        members: view.members.iter().map(|member| member.id.clone()).collect(),
        reasons: view.reasons.clone(),
        load: view.load.clone(),
    }
}

fn progress(phase: Phase) -> u8 {
    match phase {
        Phase::Gathering | Phase::Draining => 0,
        Phase::Recovering => 1,
        Phase::Planning => 2,
        Phase::Loading => 3,
        Phase::Serving => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::view::MemberView;

    fn view(phase: Phase, epoch: u64, reasons: &[&str]) -> ClusterView {
        let members = vec![MemberView { id: format!("w{epoch}"), ..MemberView::default() }];
        let load = LoadView { running: 2, waiting: 1, cache_used: 0.5 };
        let reasons = reasons.iter().map(|r| r.to_string()).collect();
        ClusterView { phase, epoch, mesh: "tp2".into(), members, reasons, load, ..ClusterView::default() }
    }

    #[test]
    fn one_that_serves_is_enough_and_none_says_why() {
        let joined = join(&[view(Phase::Loading, 1, &["loading"]), view(Phase::Serving, 2, &[])]);
        assert_eq!((joined.phase, joined.epoch, joined.reasons.len()), (Phase::Serving, 2, 0));
        assert_eq!((joined.members.len(), joined.load.running, joined.groups.len()), (2, 4, 2));
        assert_eq!(joined.groups[0].reasons, ["loading"]);
        let joined = join(&[view(Phase::Recovering, 3, &["w0 was lost"]), view(Phase::Gathering, 0, &["nobody"])]);
        assert_eq!(joined.phase, Phase::Recovering);
        assert_eq!(joined.reasons, ["group 0: w0 was lost", "group 1: nobody"]);
        let alone = view(Phase::Serving, 4, &[]);
        assert_eq!(join(std::slice::from_ref(&alone)), alone);
    }
}
