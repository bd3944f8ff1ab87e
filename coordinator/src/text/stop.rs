//! Stop strings across token borders. Text that may be the beginning of a stop string is held back until it is known.
//!
//! The match that *ends* first wins, and of those that end together the longest: so the answer does not depend on how
//! the text was cut into tokens. Each stop string is one Knuth-Morris-Pratt automaton: a byte costs one amortised step
//! a stop string, however long the text.

/// Most stop strings of one request.
pub const STOPS_MAX: usize = 16;
/// Longest stop string, in bytes.
pub const STOP_BYTES_MAX: usize = 1024;

/// Why stop strings were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StopError {
    #[error("{0} stop strings, at most {STOPS_MAX} are allowed")]
    Many(usize),
    #[error("a stop string of {0} bytes, at most {STOP_BYTES_MAX} are allowed")]
    Long(usize),
    #[error("an empty stop string would end every answer at once")]
    Empty,
}

/// Watches one answer's text.
#[derive(Debug, Clone)]
pub struct StopStrings {
    automata: Vec<Automaton>,
    /// Whether the matched string is part of the answer (`include_stop_str_in_output`).
    include: bool,
    held: String,
    stopped: bool,
}

/// What a piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Released {
    /// Text that is certain now.
    pub text: String,
    /// The index of the stop string that ended the answer; nothing follows.
    pub stop: Option<usize>,
}

#[derive(Debug, Clone)]
struct Automaton {
    stop: Vec<u8>,
    /// `failure[n]`: length of the longest proper prefix of the stop string that ends its first `n + 1` bytes.
    failure: Vec<usize>,
    /// Bytes of the stop string that end the text so far.
    state: usize,
}

impl StopStrings {
    pub fn new<S: AsRef<str>>(stops: &[S], include: bool) -> Result<StopStrings, StopError> {
        if stops.len() > STOPS_MAX {
            return Err(StopError::Many(stops.len()));
        }
        let automata = stops.iter().map(|stop| Automaton::new(stop.as_ref())).collect::<Result<_, _>>()?;
        Ok(StopStrings { automata, include, held: String::new(), stopped: false })
    }

    /// Takes whole characters; gives those that can no longer belong to a stop string.
    pub fn push(&mut self, text: &str) -> Released {
        assert!(!self.stopped, "text after the stop string");
        if self.automata.is_empty() {
            return Released { text: text.to_string(), stop: None };
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (index, byte) in text.bytes().enumerate() {
            let mut longest: Option<usize> = None;
            for which in 0..self.automata.len() {
                let matched = self.automata[which].step(byte);
                let length = self.automata[which].stop.len();
                if matched && longest.is_none_or(|best| length > self.automata[best].stop.len()) {
                    longest = Some(which);
                }
            }
            if let Some(which) = longest {
                self.stopped = true;
                let end = before + index + 1;
                self.held.truncate(if self.include { end } else { end - self.automata[which].stop.len() });
                return Released { text: std::mem::take(&mut self.held), stop: Some(which) };
            }
        }
        let hold = self.automata.iter().map(|automaton| automaton.state).max().unwrap_or(0);
        let kept = self.held.split_off(self.held.len() - hold);
        Released { text: std::mem::replace(&mut self.held, kept), stop: None }
    }

    /// The answer ended without a stop string: what was held back belongs to it.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

impl Automaton {
    fn new(stop: &str) -> Result<Automaton, StopError> {
        if stop.is_empty() {
            return Err(StopError::Empty);
        }
        if stop.len() > STOP_BYTES_MAX {
            return Err(StopError::Long(stop.len()));
        }
        let stop = stop.as_bytes().to_vec();
        let mut failure = vec![0; stop.len()];
        let mut length = 0;
        for at in 1..stop.len() {
            while length > 0 && stop[at] != stop[length] {
                length = failure[length - 1];
            }
            if stop[at] == stop[length] {
                length += 1;
            }
            failure[at] = length;
        }
        Ok(Automaton { stop, failure, state: 0 })
    }

    /// Reads one byte; true when the stop string is complete. Never called after a match.
    fn step(&mut self, byte: u8) -> bool {
        while self.state > 0 && self.stop[self.state] != byte {
            self.state = self.failure[self.state - 1];
        }
        if self.stop[self.state] == byte {
            self.state += 1;
        }
        self.state == self.stop.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The rule of the module's header, by brute force: (text of the answer, index of the stop string).
    fn naive(text: &str, stops: &[String], include: bool) -> (String, Option<usize>) {
        for end in 1..=text.len() {
            let Some(head) = text.get(..end) else { continue };
            let matched = (0..stops.len()).filter(|which| head.ends_with(&stops[*which]));
            // The first of equally long ones.
            if let Some(which) = matched.rev().max_by_key(|which| stops[*which].len()) {
                let cut = if include { end } else { end - stops[which].len() };
                return (text[..cut].to_string(), Some(which));
            }
        }
        (text.to_string(), None)
    }

    fn run(chunks: &[&str], stops: &[String], include: bool) -> (String, Option<usize>) {
        let mut watch = StopStrings::new(stops, include).unwrap();
        let mut text = String::new();
        for chunk in chunks {
            let released = watch.push(chunk);
            text.push_str(&released.text);
            if released.stop.is_some() {
                return (text, released.stop);
            }
        }
        (text + &watch.flush(), None)
    }

    #[test]
    fn a_stop_string_across_chunks_is_cut_off() {
        let stops = ["\n\nUser:".to_string(), "END".to_string()];
        assert_eq!(run(&["Hi\n", "\nUs", "er", ": more"], &stops, false), ("Hi".into(), Some(0)));
        assert_eq!(run(&["Hi\n", "\nUs", "er", ": more"], &stops, true), ("Hi\n\nUser:".into(), Some(0)));
        assert_eq!(run(&["Hi\n", "\nUs", "ed"], &stops, false), ("Hi\n\nUsed".into(), None));
    }

    #[test]
    fn text_that_cannot_begin_a_stop_string_is_not_held() {
        let mut watch = StopStrings::new(&["ab"], false).unwrap();
        assert_eq!(watch.push("xxa"), Released { text: "xx".into(), stop: None });
        assert_eq!(watch.push("a"), Released { text: "a".into(), stop: None });
        assert_eq!(watch.push("c"), Released { text: "ac".into(), stop: None });
        let mut none = StopStrings::new::<&str>(&[], false).unwrap();
        assert_eq!(none.push("anything"), Released { text: "anything".into(), stop: None });
    }

    #[test]
    fn too_many_empty_and_long_stop_strings_are_refused() {
        let many = vec!["x"; STOPS_MAX + 1];
        assert_eq!(StopStrings::new(&many, false).unwrap_err(), StopError::Many(17));
        assert_eq!(StopStrings::new(&["a", ""], false).unwrap_err(), StopError::Empty);
        let long = "x".repeat(STOP_BYTES_MAX + 1);
        assert_eq!(StopStrings::new(&[long], false).unwrap_err(), StopError::Long(1025));
    }

    proptest! {
        #[test]
        fn any_cutting_gives_what_a_search_of_the_whole_text_gives(
            chunks in prop::collection::vec("[abé世]{0,5}", 0..12),
            stops in prop::collection::vec("[abé世]{1,4}", 0..4),
            include: bool,
        ) {
            let chunks: Vec<&str> = chunks.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&chunks, &stops, include), naive(&chunks.concat(), &stops, include));
        }
    }
}
