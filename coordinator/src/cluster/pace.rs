//! Who is slow. Ranks of one step wait for each other in collectives, so all take equally long; what tells them apart is the time
//! that each computes before it enters one. Ranks of a tensor group hold equal parts of the same matrices: one that takes much longer
//! over them than its peers is on a slow device. Pure; time is an argument.

use model::mesh::{Mesh, RankId};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// What a rank has computed since it was loaded: collectives of its tensor group entered, and the time before them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Toll {
    pub entered: u64,
    pub computing: Duration,
}

/// Paces are compared over so long.
const WINDOW: Duration = Duration::from_secs(3);

/// A rank that computed less in a window says nothing.
const ENTERED_MIN: u64 = 100;

/// Slower than the middle one of its peers by this, in halves, is slow; and then until it is less than this.
const SLOW_HALVES: u64 = 4;
const QUICK_HALVES: u64 = 3;

/// For so long: a neighbour's burst of work is no slow device. Nor is a break shorter than this a recovery.
const LASTING: Duration = Duration::from_secs(3);

/// The paces of one epoch's ranks.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Paces {
    told: BTreeMap<RankId, VecDeque<(Duration, Toll)>>,
    behind: BTreeMap<RankId, Behind>,
}

/// A rank that is slower than its peers: since when, when it last was, and how many times their pace it took then.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Behind {
    since: Duration,
    last: Duration,
    times: f64,
}

impl Paces {
    /// A rank's toll at time `now`, as its worker says.
    pub fn told(&mut self, now: Duration, rank: RankId, toll: Toll) {
        let told = self.told.entry(rank).or_default();
        if told.back().is_some_and(|(_, last)| toll.entered < last.entered) {
            told.clear();
        }
        told.push_back((now, toll));
        // The oldest one kept is the last before the window.
        while told.get(1).is_some_and(|(at, _)| *at + WINDOW <= now) {
            told.pop_front();
        }
    }

    /// Time a collective over the window, in nanoseconds.
    fn pace(&self, now: Duration, rank: RankId) -> Option<u64> {
        let told = self.told.get(&rank)?;
        let ((first, before), (_, after)) = (told.front()?, told.back()?);
        let entered = after.entered - before.entered;
        let whole = *first + WINDOW <= now && entered >= ENTERED_MIN;
        whole.then(|| (after.computing.saturating_sub(before.computing).as_nanos() as u64) / entered)
    }

    /// The ranks that are slow now, each with how many times its peers' pace it takes.
    pub fn slow(&mut self, now: Duration, mesh: &Mesh) -> Vec<(RankId, f64)> {
        self.behind.retain(|_, behind| now < behind.last + LASTING);
        for rank in mesh.all() {
            let peers = mesh.tensor_group(rank).into_iter().filter(|peer| *peer != rank);
            let mut paces: Vec<u64> = peers.filter_map(|peer| self.pace(now, peer)).collect();
            paces.sort_unstable();
            // Of two in the middle the slower one: who is slow must be slower than most.
            let (Some(own), Some(&middle)) = (self.pace(now, rank), paces.get(paces.len() / 2)) else { continue };
            let halves = if self.behind.contains_key(&rank) { QUICK_HALVES } else { SLOW_HALVES };
            if own * 2 < middle.max(1) * halves {
                continue;
            }
            let since = self.behind.get(&rank).map_or(now, |behind| behind.since);
            self.behind.insert(rank, Behind { since, last: now, times: own as f64 / middle.max(1) as f64 });
        }
        let lasting = self.behind.iter().filter(|(_, behind)| behind.since + LASTING <= behind.last);
        lasting.map(|(rank, behind)| (*rank, behind.times)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mesh(tensor: usize) -> Mesh {
        Mesh::new(1, 1, tensor, 1).unwrap()
    }

    /// Beats every 300 ms for `seconds`, each rank at its own pace in microseconds a collective; who was slow, and when first.
    fn run(paces: &[u64], entered_a_beat: u64, seconds: u64) -> Vec<(RankId, u64)> {
        let (mut of, mut first) = (Paces::default(), Vec::new());
        for beat in 0..seconds * 1000 / 300 {
            let now = Duration::from_millis(beat * 300);
            for (rank, pace) in paces.iter().enumerate() {
                let entered = beat * entered_a_beat;
                let computing = Duration::from_micros(entered * pace);
                of.told(now, RankId(rank as u32), Toll { entered, computing });
            }
            for (rank, _) in of.slow(now, &mesh(paces.len())) {
                if first.iter().all(|(known, _)| *known != rank) {
                    first.push((rank, now.as_millis() as u64));
                }
            }
        }
        first
    }

    #[test]
    fn one_at_half_its_peers_speed_is_named_within_ten_seconds() {
        let cases = [(&[100, 210][..], &[1][..]), (&[100, 100, 250, 110], &[2]), (&[400, 100, 90, 190], &[0])];
        for (paces, slow) in cases {
            let found = run(paces, 50, 10);
            assert_eq!(found.iter().map(|(rank, _)| rank.0).collect::<Vec<_>>(), slow, "{paces:?}: {found:?}");
            assert!(found.iter().all(|(_, at)| *at < 8_000), "{found:?}");
        }
    }

    #[test]
    fn who_differs_a_little_or_computes_little_is_not() {
        assert_eq!(run(&[100, 190], 50, 30), []);
        assert_eq!(run(&[100, 900], 3, 30), [], "too few to tell");
        assert_eq!(run(&[100], 50, 30), [], "there is nobody to compare with");
        assert_eq!(run(&[100, 100, 150, 190], 50, 30), []);
    }

    #[test]
    fn a_burst_is_forgiven_and_a_new_epoch_begins_anew() {
        let mut of = Paces::default();
        let mut computing = [Duration::ZERO; 2];
        for beat in 0..60u64 {
            let now = Duration::from_millis(beat * 300);
            for rank in 0..2u32 {
                // The second is slow for two seconds of every ten.
                let slow = rank == 1 && (now.as_secs() % 10) < 2;
                computing[rank as usize] += Duration::from_micros(if slow { 12_500 } else { 5_000 });
                of.told(now, RankId(rank), Toll { entered: beat * 50, computing: computing[rank as usize] });
            }
            assert_eq!(of.slow(now, &mesh(2)), []);
        }
        of.told(Duration::from_secs(19), RankId(1), Toll::default());
        assert_eq!(of.pace(Duration::from_secs(30), RankId(1)), None);
    }
}
