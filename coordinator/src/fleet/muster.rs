//! Which group a worker joins, and whom one group has to spare for another; pure.

use crate::api::view::{ClusterView, Phase};
use model::plan::WorkerId;
use std::collections::BTreeMap;

/// The members of all groups.
#[derive(Debug)]
pub struct Muster {
    /// Workers that a group waits for.
    wanted: usize,
    groups: usize,
    /// Where each worker is, or was last: one that is restarted finds its matrices' neighbours there.
    places: BTreeMap<WorkerId, Place>,
}

#[derive(Debug)]
struct Place {
    group: usize,
    /// Its connection, while it has one.
    connection: Option<u64>,
}

/// Names of workers that left are remembered up to here, beside those that are there.
const REMEMBERED: usize = 4096;

impl Muster {
    pub fn new(groups: usize, wanted: usize) -> Muster {
        assert!(groups > 0, "a cluster has a group");
        Muster { wanted, groups, places: BTreeMap::new() }
    }

    fn members(&self, group: usize, but: &WorkerId) -> usize {
        let here = |(id, place): &(&WorkerId, &Place)| place.group == group && place.connection.is_some() && *id != but;
        self.places.iter().filter(here).count()
    }

    /// The group that `worker` joins by a new connection: its last one while that is short of workers, else the one that is
    /// shortest, else its last one again, else the smallest.
    pub fn joined(&mut self, worker: &WorkerId, connection: u64) -> usize {
        let members: Vec<usize> = (0..self.groups).map(|group| self.members(group, worker)).collect();
        let short = |group: usize| self.wanted.saturating_sub(members[group]);
        let last = self.places.get(worker).map(|place| place.group);
        let shortest = (0..self.groups).max_by_key(|&group| (short(group), self.groups - group)).expect("there is one");
        let smallest = (0..self.groups).min_by_key(|&group| members[group]).expect("there is one");
        let group = match last {
            Some(last) if short(last) > 0 => last,
            _ if short(shortest) > 0 => shortest,
            Some(last) => last,
            None => smallest,
        };
        if self.places.len() > REMEMBERED {
            self.places.retain(|_, place| place.connection.is_some());
        }
        self.places.insert(worker.clone(), Place { group, connection: Some(connection) });
        group
    }

    /// Where this connection's worker is; none once another took its place.
    pub fn of(&self, worker: &WorkerId, connection: u64) -> Option<usize> {
        self.places.get(worker).filter(|place| place.connection == Some(connection)).map(|place| place.group)
    }

    /// Where a worker is, whatever its connection.
    pub fn group(&self, worker: &WorkerId) -> Option<usize> {
        self.places.get(worker).filter(|place| place.connection.is_some()).map(|place| place.group)
    }

    pub fn gone(&mut self, worker: &WorkerId, connection: u64) {
        if let Some(place) = self.places.get_mut(worker).filter(|place| place.connection == Some(connection)) {
            place.connection = None;
        }
    }

    /// A worker that its group can do without while another group can't serve for want of one: with its connection, which
    /// is to be closed. It will join the other group.
    pub fn spare(&mut self, views: &[ClusterView]) -> Option<(WorkerId, u64, usize)> {
        let nobody = WorkerId(String::new());
        (0..self.groups)
            .find(|&group| views[group].phase != Phase::Serving && self.members(group, &nobody) < self.wanted)?;
        let serving = views.iter().enumerate().filter(|(_, view)| view.phase == Phase::Serving);
        let idle = |(group, view): (usize, &ClusterView)| {
            // More than it waits for: it plans with fewer only while it has no choice.
            let enough = self.members(group, &nobody) > self.wanted;
            let spare = view.members.iter().filter(|m| enough && m.ranks.is_empty() && m.phase == "idle");
            spare.map(|m| (WorkerId(m.id.clone()), group)).next()
        };
        let (worker, group) = serving.filter_map(idle).next()?;
        let place = self.places.get_mut(&worker).filter(|place| place.group == group)?;
        let connection = place.connection.take()?;
        Some((worker, connection, group))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::view::MemberView;

    fn id(n: usize) -> WorkerId {
        WorkerId(format!("w{n}"))
    }

    fn filled(groups: usize, wanted: usize, workers: usize) -> (Muster, Vec<usize>) {
        let mut muster = Muster::new(groups, wanted);
        let places = (0..workers).map(|n| muster.joined(&id(n), n as u64)).collect();
        (muster, places)
    }

    #[test]
    fn the_shortest_group_gets_the_newcomer_and_spares_spread() {
        assert_eq!(filled(2, 2, 6).1, [0, 1, 0, 1, 0, 1]);
        assert_eq!(filled(3, 1, 4).1, [0, 1, 2, 0]);
        assert_eq!(filled(1, 4, 3).1, [0, 0, 0]);
    }

    #[test]
    fn a_worker_that_comes_back_finds_its_place() {
        let (mut muster, _) = filled(2, 2, 4);
        muster.gone(&id(3), 3);
        assert_eq!((muster.of(&id(3), 3), muster.group(&id(3))), (None, None));
        assert_eq!(muster.joined(&id(3), 10), 1);
        assert_eq!((muster.of(&id(3), 3), muster.of(&id(3), 10)), (None, Some(1)));
        // A connection that ends late changes nothing.
        muster.gone(&id(3), 3);
        assert_eq!(muster.group(&id(3)), Some(1));
        // Joined again before the old connection ended.
        assert_eq!(muster.joined(&id(0), 11), 0);
    }

    #[test]
    fn a_group_that_lacks_a_worker_gets_another_groups_spare() {
        let (mut muster, places) = filled(2, 2, 5);
        assert_eq!(places, [0, 1, 0, 1, 0]);
        let member = |n: usize, ranks: &[u32]| MemberView {
            id: id(n).0,
            ranks: ranks.to_vec(),
            phase: if ranks.is_empty() { "idle" } else { "ready" }.into(),
            ..MemberView::default()
        };
        let members = vec![member(0, &[0]), member(2, &[1]), member(4, &[])];
        let serves = ClusterView { phase: Phase::Serving, members, ..ClusterView::default() };
        let lacks = ClusterView { phase: Phase::Recovering, members: vec![member(1, &[])], ..ClusterView::default() };
        let views = [serves.clone(), lacks];
        assert_eq!(muster.spare(&views), None, "both have what they wait for");
        muster.gone(&id(3), 3);
        assert_eq!(muster.spare(&views), Some((id(4), 4, 0)));
        assert_eq!(muster.spare(&views), None, "once");
        assert_eq!(muster.joined(&id(4), 20), 1);
        assert_eq!(muster.spare(&[serves.clone(), serves]), None);
    }
}
