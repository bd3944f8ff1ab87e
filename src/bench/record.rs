//! What one request did, as its client saw it.

use std::time::Duration;

/// One answered request. Times are since the start of the run.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// When it was due (open loop) or sent (closed loop): waiting in the client's own queue counts as latency.
    pub started: Duration,
    /// Each arrival of tokens: when, and how many at once.
    pub arrivals: Vec<(Duration, usize)>,
    pub ended: Duration,
    /// As the server counted.
    pub input: usize,
    pub output: usize,
    /// Of the input, taken from the server's prefix cache.
    pub cached: usize,
}

/// Why a request has no record; requests are counted by this.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Failure {
    #[error("no connection")]
    Connect,
    #[error("HTTP {0}")]
    Status(u16),
    #[error("error in the stream: {0}")]
    Stream(String),
    #[error("stream broken off")]
    Broken,
    #[error("timed out")]
    Timeout,
    #[error("not the expected JSON")]
    Protocol,
    #[error("no tokens")]
    Empty,
    #[error("fewer tokens than asked for")]
    Short,
}

impl Record {
    /// Time to the first token.
    pub fn first(&self) -> Duration {
        self.arrivals.first().map_or(Duration::ZERO, |(at, _)| at.saturating_sub(self.started))
    }

    pub fn whole(&self) -> Duration {
        self.ended.saturating_sub(self.started)
    }

    /// Mean time of a token after the first arrival's; none where everything came at once.
    pub fn per_token(&self) -> Option<Duration> {
        let (first, last) = (self.arrivals.first()?, self.arrivals.last()?);
        let later = self.arrivals[1..].iter().map(|(_, tokens)| tokens).sum::<usize>();
        (later > 0).then(|| last.0.saturating_sub(first.0).div_f64(later as f64))
    }

    /// The gaps between arrivals. Tokens that came together are one arrival: a burst does not look smooth.
    pub fn gaps(&self) -> impl Iterator<Item = Duration> {
        self.arrivals.windows(2).map(|pair| pair[1].0.saturating_sub(pair[0].0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn latencies_follow_from_the_arrivals() {
        let arrivals = vec![(ms(150), 1), (ms(170), 1), (ms(210), 3)];
        let record = Record { started: ms(100), arrivals, ended: ms(215), input: 7, output: 5, cached: 0 };
        assert_eq!((record.first(), record.whole()), (ms(50), ms(115)));
        assert_eq!(record.per_token(), Some(ms(15)), "four tokens in 60 ms");
        assert_eq!(record.gaps().collect::<Vec<_>>(), [ms(20), ms(40)]);
        let single = Record { arrivals: vec![(ms(150), 5)], ..record };
        assert_eq!((single.per_token(), single.gaps().count()), (None, 0));
    }
}
