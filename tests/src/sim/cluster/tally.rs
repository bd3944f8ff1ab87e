//! Proof that faults fired, and that what follows from them happened.

use super::world::Mode;

macro_rules! tally {
    ($($field:ident),* $(,)?) => {
        #[derive(Debug, Clone, Copy, Default)]
        pub struct Tally { $(pub $field: u64),* }

        impl Tally {
            pub fn add(&mut self, other: &Tally) {
                $(self.$field += other.$field;)*
            }

            /// Names of what never happened, though it must in this mode.
            pub fn missing(&self, mode: Mode) -> Vec<&'static str> {
                let never = [$((stringify!($field), self.$field)),*].into_iter().filter(|(_, n)| *n == 0);
                let proof = |name: &str| mode == Mode::Liveness || !["checks_of_recovery", "lost_for_good"].contains(&name);
                never.map(|(name, _)| name).filter(|name| proof(name)).collect()
            }
        }
    };
}

tally! {
    // Faults.
    workers_killed, coordinators_killed, leaders_killed, hosts_lost, lost_for_good, restarts, pauses, delays, resets, cuts_one_way,
    cuts_both_ways, slow_ranks, leases_lost, store_outages, duplicates, drains_asked, leavings, resignations, replays,
    data_cuts, data_stalls, answers_lost, steps_overtook_loaded,
    // What the store and the fences said.
    terms, epochs_committed, commits_fenced, commits_refused, store_unanswered, stale_loads_refused, stale_answers, stale_orders, step_streams_refused,
    // What followed.
    served, newcomers, halted_by_death, halted_while_stuck, reshaped, drained, joined_again, words_of_older_connections, silent_coordinators, deposed_by_word, two_leaders_believed,
    resumed_by_next_leader, outlived_a_death, worker_faults, load_failures, served_without_store,
    requests_finished, tokens_checked, choices_shared, scores_checked, cancelled, enough, refused, given_up, killers_given_up,
    lost_with_coordinator, checks_of_recovery,
}
