//! Server-sent events from bytes that arrive in any pieces.

/// Longest event; a server that sends more without an end is broken.
const EVENT_BYTES_MAX: usize = 16 << 20;

/// The parser's state between pieces.
#[derive(Debug, Default)]
pub struct Events {
    line: Vec<u8>,
    data: Option<String>,
    /// The last line ended with a carriage return: a line feed that follows belongs to it.
    returned: bool,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event of more than {EVENT_BYTES_MAX} bytes")]
pub struct TooLong;

impl Events {
    /// Takes bytes; gives the data of the events that are complete.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<String>, TooLong> {
        let mut events = Vec::new();
        for byte in bytes {
            let follows_return = std::mem::replace(&mut self.returned, *byte == b'\r');
            match byte {
                b'\n' if follows_return => {}
                b'\n' | b'\r' => events.extend(self.end_of_line()),
                byte => self.line.push(*byte),
            }
            if self.line.len() + self.data.as_ref().map_or(0, String::len) > EVENT_BYTES_MAX {
                return Err(TooLong);
            }
        }
        Ok(events)
    }

    /// An empty line ends an event; other lines are fields of it, or comments.
    fn end_of_line(&mut self) -> Option<String> {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            return self.data.take();
        }
        let value = line.strip_prefix(b"data:")?;
        let value = String::from_utf8_lossy(value.strip_prefix(b" ").unwrap_or(value)).into_owned();
        match &mut self.data {
            None => self.data = Some(value),
            Some(data) => {
                data.push('\n');
                data.push_str(&value);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_wherever_the_bytes_are_split() {
        let stream = "\u{feff}: hi\r\n\r\ndata: {\"text\":\"é\"}\r\n\r\nevent: x\ndata:a\ndata:  b\n\nid: 1\n\ndata\n\ndata: [DONE]\r\rdata: cut";
        let expected = ["{\"text\":\"é\"}", "a\n b", "[DONE]"];
        let bytes = stream.as_bytes();
        for first in 0..=bytes.len() {
            for second in first..=bytes.len() {
                let mut events = Events::default();
                let mut seen = Vec::new();
                for piece in [&bytes[..first], &bytes[first..second], &bytes[second..]] {
                    seen.extend(events.push(piece).unwrap());
                }
                assert_eq!(seen, expected, "split at {first} and {second}");
            }
        }
    }

    #[test]
    fn an_endless_event_is_refused() {
        let mut events = Events::default();
        let piece = vec![b'x'; 1 << 20];
        let outcome = (0..17).try_for_each(|_| events.push(&piece).map(|_| ()));
        assert_eq!(outcome, Err(TooLong));
    }
}
