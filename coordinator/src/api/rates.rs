//! What a key may use at once and in a minute, and what it has used. Pure: time is an argument.
//!
//! Requests and tokens each fill a bucket that holds a minute's worth and runs over. A request is let in while its prompt
//! fits into what is left; what it generates is taken as it comes, below zero if need be, and later requests wait until
//! that is made good. So nobody need say how long an answer is going to be, and in the long run the rate is kept.

use std::time::{Duration, Instant};

const MINUTE: Duration = Duration::from_secs(60);

/// What holds a request back ends when another request does, and nobody knows when that is.
const WAIT_CONCURRENT: Duration = Duration::from_secs(1);

/// What a key may use; none is without bound.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    pub requests_per_minute: Option<u32>,
    /// Prompts and answers together.
    pub tokens_per_minute: Option<u32>,
    pub max_concurrent: Option<u32>,
    /// Its share where others wait too, beside their weights; 1 where nothing is said.
    pub weight: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Requests,
    Tokens,
    Concurrent,
}

impl What {
    /// As metrics name it.
    pub fn label(self) -> &'static str {
        match self {
            What::Requests => "requests",
            What::Tokens => "tokens",
            What::Concurrent => "concurrent",
        }
    }
}

/// A limit is reached; after `wait` it may not be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this key may have {limit} {}; try again in {} s", self.meaning(), self.seconds())]
pub struct Excess {
    pub what: What,
    pub limit: u32,
    pub wait: Duration,
}

impl Excess {
    fn meaning(&self) -> &'static str {
        match self.what {
            What::Requests => "requests a minute",
            What::Tokens => "tokens a minute, prompts and answers together",
            What::Concurrent => "requests at a time",
        }
    }

    /// Whole seconds, at least one.
    pub fn seconds(&self) -> u32 {
        (self.wait.as_secs_f64().ceil() as u32).max(1)
    }
}

/// Fills by `limit` a minute and holds as much.
#[derive(Debug)]
struct Bucket {
    limit: u32,
    /// What may still be taken; below zero what was taken beyond.
    level: f64,
    at: Instant,
}

impl Bucket {
    fn full(limit: u32, now: Instant) -> Bucket {
        Bucket { limit, level: limit.into(), at: now }
    }

    fn fill(&mut self, now: Instant) {
        let more = now.saturating_duration_since(self.at).as_secs_f64() / MINUTE.as_secs_f64() * f64::from(self.limit);
        (self.level, self.at) = ((self.level + more).min(self.limit.into()), self.at.max(now));
    }

    /// Until it holds `amount`.
    fn wait(&self, amount: f64) -> Duration {
        let missing = (amount - self.level).max(0.0);
        MINUTE.mul_f64(missing / f64::from(self.limit.max(1)))
    }

    /// Takes `amount` if it is there, or if all of it is there that ever can be.
    fn take(&mut self, amount: f64, what: What, now: Instant) -> Result<(), Excess> {
        self.fill(now);
        let needed = amount.min(self.limit.into()).max(1.0);
        // A millionth is lost to rounding, not to anybody's greed.
        if self.level + 1e-6 < needed {
            return Err(Excess { what, limit: self.limit, wait: self.wait(needed) });
        }
        self.level -= amount;
        Ok(())
    }

    fn standing(&mut self, now: Instant) -> Standing {
        self.fill(now);
        Standing { limit: self.limit, left: self.level.max(0.0) as u32, full_in: self.wait(self.limit.into()) }
    }
}

/// How much of a limit is left, and when all of it will be again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    pub limit: u32,
    pub left: u32,
    pub full_in: Duration,
}

/// What a key has used.
#[derive(Debug)]
pub struct Usage {
    limits: Limits,
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    running: u32,
}

impl Usage {
    pub fn new(limits: Limits, now: Instant) -> Usage {
        let full = |limit: Option<u32>| limit.map(|limit| Bucket::full(limit, now));
        Usage { limits, requests: full(limits.requests_per_minute), tokens: full(limits.tokens_per_minute), running: 0 }
    }

    /// From now on these limits. What was used stays used: what differs from before begins full.
    pub fn limit(&mut self, limits: Limits, now: Instant) {
        let before = std::mem::replace(self, Usage::new(limits, now));
        self.running = before.running;
        if before.limits.requests_per_minute == limits.requests_per_minute {
            self.requests = before.requests;
        }
        if before.limits.tokens_per_minute == limits.tokens_per_minute {
            self.tokens = before.tokens;
        }
    }

    /// One request more; each that came in must [`leave`](Usage::leave).
    pub fn enter(&mut self, now: Instant) -> Result<(), Excess> {
        if let Some(limit) = self.limits.max_concurrent.filter(|&limit| self.running >= limit) {
            return Err(Excess { what: What::Concurrent, limit, wait: WAIT_CONCURRENT });
        }
        if let Some(requests) = &mut self.requests {
            requests.take(1.0, What::Requests, now)?;
        }
        self.running += 1;
        Ok(())
    }

    pub fn weight(&self) -> u32 {
        self.limits.weight.unwrap_or(1)
    }

    pub fn leave(&mut self) {
        self.running = self.running.checked_sub(1).expect("whoever leaves came in");
    }

    /// A prompt of so many tokens, before it is computed.
    pub fn prompt(&mut self, tokens: usize, now: Instant) -> Result<(), Excess> {
        match &mut self.tokens {
            Some(bucket) => bucket.take(tokens as f64, What::Tokens, now),
            None => Ok(()),
        }
    }

    /// So many tokens were generated.
    pub fn generated(&mut self, tokens: usize) {
        if let Some(bucket) = &mut self.tokens {
            bucket.level -= tokens as f64;
        }
    }

    /// A prompt was not computed after all.
    pub fn refund(&mut self, tokens: usize) {
        if let Some(bucket) = &mut self.tokens {
            bucket.level += tokens as f64;
        }
    }

    /// Of requests and of tokens, where they are limited.
    pub fn standing(&mut self, now: Instant) -> (Option<Standing>, Option<Standing>) {
        let standing = |bucket: &mut Bucket| bucket.standing(now);
        (self.requests.as_mut().map(standing), self.tokens.as_mut().map(standing))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(requests: Option<u32>, tokens: Option<u32>, concurrent: Option<u32>) -> (Usage, Instant) {
        let limits = Limits {
            requests_per_minute: requests,
            tokens_per_minute: tokens,
            max_concurrent: concurrent,
            weight: None,
        };
        let start = Instant::now();
        (Usage::new(limits, start), start)
    }

    #[test]
    fn a_minute_s_requests_may_come_at_once_and_then_one_by_one() {
        let (mut usage, start) = usage(Some(6), None, None);
        (0..6).for_each(|n| usage.enter(start).unwrap_or_else(|e| panic!("request {n}: {e}")));
        let excess = usage.enter(start).unwrap_err();
        assert_eq!((excess.what, excess.limit, excess.seconds()), (What::Requests, 6, 10));
        assert_eq!(usage.enter(start + Duration::from_secs(9)).unwrap_err().seconds(), 1);
        usage.enter(start + Duration::from_secs(10)).unwrap();
        assert!(usage.enter(start + Duration::from_secs(10)).is_err());
        let hour = start + Duration::from_secs(3600);
        (0..6).for_each(|_| usage.enter(hour).unwrap());
        assert!(usage.enter(hour).is_err(), "no more than a minute's worth is kept");
        assert!(usage.enter(start).is_err(), "a clock that goes back gives nothing");
    }

    #[test]
    fn an_answer_longer_than_what_is_left_is_made_good_later() {
        let (mut usage, start) = usage(None, Some(600), None);
        usage.prompt(500, start).unwrap();
        usage.prompt(100, start).unwrap();
        usage.refund(100);
        usage.generated(400);
        assert_eq!(usage.standing(start).1, Some(Standing { limit: 600, left: 0, full_in: Duration::from_secs(90) }));
        let excess = usage.prompt(100, start).unwrap_err();
        assert_eq!((excess.what, excess.seconds()), (What::Tokens, 40));
        usage.prompt(100, start + Duration::from_secs(40)).unwrap();
        // A prompt longer than the limit is let in when nothing else was.
        let later = start + Duration::from_secs(3600);
        usage.prompt(6000, later).unwrap();
        assert_eq!(usage.prompt(1, later).unwrap_err().seconds(), 541);
    }

    #[test]
    fn places_are_free_again_when_requests_leave() {
        let (mut usage, now) = usage(None, None, Some(2));
        usage.enter(now).unwrap();
        usage.enter(now).unwrap();
        assert_eq!(usage.enter(now).unwrap_err().what, What::Concurrent);
        usage.leave();
        usage.enter(now).unwrap();
        assert_eq!(usage.standing(now), (None, None));
    }

    #[test]
    fn a_limit_of_nothing_lets_nothing_in() {
        let (mut usage, now) = usage(Some(0), Some(0), None);
        assert!(usage.enter(now).is_err() && usage.prompt(1, now + MINUTE * 60).is_err());
    }

    #[test]
    fn new_limits_forget_nothing_that_stays_limited() {
        let (mut usage, now) = usage(Some(1), None, Some(1));
        usage.enter(now).unwrap();
        let more = Limits {
            requests_per_minute: Some(1),
            tokens_per_minute: Some(10),
            max_concurrent: Some(5),
            weight: Some(2),
        };
        usage.limit(more, now);
        assert_eq!(usage.weight(), 2);
        assert_eq!(usage.enter(now).unwrap_err().what, What::Requests);
        usage.limit(Limits { requests_per_minute: Some(2), max_concurrent: Some(1), ..more }, now);
        assert_eq!(usage.enter(now).unwrap_err().what, What::Concurrent);
        usage.leave();
        usage.enter(now).unwrap();
    }
}
