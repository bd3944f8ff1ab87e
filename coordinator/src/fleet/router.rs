//! Which group a request goes to; pure. The work that it makes there decides: what of its prompt the group has not computed
//! lately, and what waits and runs there already. What a group has computed is guessed from what was sent to it; a wrong guess
//! costs a prefill, never an answer.

use crate::schedule::blocks::BlockHash;
use crate::schedule::load::Load;
use model::plan::BLOCK_TOKENS;
use std::collections::BTreeMap;

/// What a sequence that waits or runs is taken to cost, in tokens to be computed: about an answer's length.
const SEQUENCE_TOKENS: usize = 128;

/// What is known of a group when a request comes.
#[derive(Debug, Clone, Copy)]
pub struct Standing {
    pub serves: bool,
    pub load: Load,
}

/// What was sent to each group.
#[derive(Debug)]
pub struct Router {
    hash: BlockHash,
    groups: Vec<Sent>,
    clock: u64,
}

#[derive(Debug, Default)]
struct Sent {
    jobs: u64,
    /// Prefixes, by the hash of their last block, and when each was last used; and the same the other way round.
    used: BTreeMap<u64, u64>,
    order: BTreeMap<u64, u64>,
}

impl Sent {
    fn touch(&mut self, hash: u64, now: u64, most: usize) {
        if let Some(before) = self.used.insert(hash, now) {
            self.order.remove(&before);
        }
        self.order.insert(now, hash);
        while self.used.len() > most {
            let Some((_, oldest)) = self.order.pop_first() else { return };
            self.used.remove(&oldest);
        }
    }
}

impl Router {
    pub fn new(groups: usize, hash: BlockHash) -> Router {
        assert!(groups > 0, "a cluster has a group");
        Router { hash, groups: (0..groups).map(|_| Sent::default()).collect(), clock: 0 }
    }

    /// The group for a request with this prompt and salt; `standings` has one entry a group. Those that serve come first,
    /// then the least work, then the fewest requests sent.
    pub fn pick(&mut self, prompt: &[u32], salt: u64, standings: &[Standing]) -> usize {
        assert_eq!(standings.len(), self.groups.len(), "one entry a group");
        let mut hashes = Vec::with_capacity(prompt.len() / BLOCK_TOKENS);
        let mut parent = salt;
        for block in prompt.chunks_exact(BLOCK_TOKENS) {
            parent = (self.hash)(parent, block);
            hashes.push(parent);
        }
        let rank = |group: &usize| {
            let (sent, Standing { serves, load }) = (&self.groups[*group], &standings[*group]);
            let found = hashes.iter().take_while(|hash| sent.used.contains_key(hash)).count();
            let prefill = prompt.len() - found * BLOCK_TOKENS;
            // Those on their way are in no load yet.
            let on_way = sent.jobs.saturating_sub(load.jobs_accepted + load.jobs_refused) as usize;
            let work = prefill + (load.running + load.waiting + on_way) * SEQUENCE_TOKENS;
            (!serves, work, sent.jobs)
        };
        let group = (0..standings.len()).min_by_key(rank).expect("there is one");
        let sent = &mut self.groups[group];
        sent.jobs += 1;
        // Ends of long prompts are forgotten before their beginnings, which others share.
        let most = standings[group].load.blocks_total.max(1024);
        for hash in hashes.into_iter().rev() {
            self.clock += 1;
            sent.touch(hash, self.clock, most);
        }
        group
    }

    /// A group lost what it had computed, and counts anew.
    pub fn forget(&mut self, group: usize, load: &Load) {
        self.groups[group] = Sent { jobs: load.jobs_accepted + load.jobs_refused, ..Sent::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::blocks::chained_hash;

    fn standing(running: usize, sent: u64) -> Standing {
        let load = Load { running, jobs_accepted: sent, blocks_total: 64, ..Load::default() };
        Standing { serves: true, load }
    }

    fn prompt(first: u32, tokens: usize) -> Vec<u32> {
        (0..tokens as u32).map(|n| first * 10_000 + n).collect()
    }

    #[test]
    fn equal_groups_take_turns_though_no_load_was_told_yet() {
        let mut router = Router::new(3, chained_hash);
        let idle = [standing(0, 0); 3];
        let picked: Vec<usize> = (0..6).map(|n| router.pick(&prompt(n, 40), 0, &idle)).collect();
        assert_eq!(picked, [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn a_prefix_is_sent_where_it_was_until_that_group_has_too_much_to_do() {
        let mut router = Router::new(2, chained_hash);
        let mut sent = [0, 0];
        let pick = |router: &mut Router, sent: &mut [u64; 2], prompt: &[u32], salt, running: [usize; 2]| {
            let standings = [standing(running[0], sent[0]), standing(running[1], sent[1])];
            let group = router.pick(prompt, salt, &standings);
            sent[group] += 1;
            group
        };
        let shared = prompt(1, 1024);
        assert_eq!(pick(&mut router, &mut sent, &shared, 0, [1, 0]), 1);
        let longer = [shared.clone(), prompt(2, 50)].concat();
        assert_eq!(pick(&mut router, &mut sent, &longer, 0, [0, 7]), 1, "seven sequences cost less than 1,024 tokens");
        assert_eq!(pick(&mut router, &mut sent, &longer, 0, [0, 12]), 0);
        assert_eq!(pick(&mut router, &mut sent, &longer, 9, [0, 1]), 0, "another tenant shares nothing");
        assert_eq!(pick(&mut router, &mut sent, &prompt(3, 1024), 0, [1, 0]), 1);
        router.forget(1, &Load { jobs_accepted: sent[1], ..Load::default() });
        assert_eq!(pick(&mut router, &mut sent, &prompt(3, 1024), 0, [0, 1]), 0, "it died since");
    }

    #[test]
    fn a_group_that_does_not_serve_gets_nothing_while_another_does() {
        let mut router = Router::new(2, chained_hash);
        let away = Standing { serves: false, ..standing(0, 0) };
        assert_eq!(router.pick(&prompt(1, 64), 0, &[away, standing(50, 0)]), 1);
        assert_eq!(router.pick(&prompt(1, 64), 0, &[away, away]), 0, "somewhere it must wait");
    }

    #[test]
    fn no_more_is_remembered_than_a_group_can_hold() {
        let mut router = Router::new(1, chained_hash);
        for n in 0..100 {
            router.pick(&prompt(n, 20 * BLOCK_TOKENS), 0, &[standing(0, n.into())]);
        }
        let sent = &router.groups[0];
        assert_eq!((sent.used.len(), sent.order.len()), (1024, 1024));
    }
}
