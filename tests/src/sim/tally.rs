//! Proof that what is meant to be simulated happened.

/// Counts over one or more seeds.
macro_rules! tally {
    ($($field:ident),* $(,)?) => {
        #[derive(Debug, Clone, Copy, Default)]
        pub struct Tally { $(pub $field: u64),* }

        impl Tally {
            pub fn add(&mut self, other: &Tally) {
                $(self.$field += other.$field;)*
            }

            /// Names of what never happened.
            pub fn missing(&self) -> Vec<&'static str> {
                [$((stringify!($field), self.$field)),*].iter().filter(|(_, n)| *n == 0).map(|(name, _)| *name).collect()
            }
        }
    };
}

tally! {
    steps, jobs_finished, tokens_checked, ended_by_token, ended_by_length, model_length_reached,
    prefix_hits_tokens, hits_with_colliding_hashes, choices_that_share, prompt_scores_checked, nothing_drawn,
    chunked_prefills, mixed_steps, idle_lanes, overlapping_steps, histories, fed, drafts_refused, drafts_accepted,
    preemptions, cancels_waiting, cancels_in_flight, faults, faults_in_flight, requeues, failed_after_replan, killers_given_up, jobs_before_plan,
    refused_queue_full, refused_too_long, refused_never_fits,
}
