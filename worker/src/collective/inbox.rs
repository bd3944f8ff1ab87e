//! Messages cut out of a peer's byte stream: an 8-byte header (channel and length), then the bytes.

use model::fault::{Fault, FaultKind};
use std::collections::VecDeque;

/// What a frame is for. Each channel keeps its own order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// `send` and `receive`.
    Message = 0,
    /// Parts of sums, gathers and exchanges.
    Collective = 1,
    /// The peer leaves in peace: what follows is the end of its stream.
    Goodbye = 2,
}

pub const HEADER: usize = 8;

/// No frame is longer: a larger length is a stream that lost its place.
const BYTES_MAX: u64 = 1 << 40;

/// Room taken on the word of a header alone; the rest is taken as bytes arrive.
const RESERVE_MAX: usize = 1 << 20;

/// The header of a frame of `bytes` bytes.
pub fn header(channel: Channel, bytes: usize) -> [u8; HEADER] {
    let bytes = bytes as u64;
    assert!(bytes <= BYTES_MAX, "a message of {bytes} bytes");
    (((channel as u64) << 56) | bytes).to_le_bytes()
}

/// One peer's messages: whole ones in order, and the one that is arriving.
#[derive(Default)]
pub struct Inbox {
    messages: VecDeque<Vec<u8>>,
    collective: VecDeque<Vec<u8>>,
    goodbye: bool,
    head: [u8; HEADER],
    head_bytes: usize,
    body: Vec<u8>,
}

impl Inbox {
    /// Takes in the next bytes of the stream.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), Fault> {
        while !bytes.is_empty() {
            if self.head_bytes < HEADER {
                let taken = bytes.len().min(HEADER - self.head_bytes);
                self.head[self.head_bytes..self.head_bytes + taken].copy_from_slice(&bytes[..taken]);
                self.head_bytes += taken;
                bytes = &bytes[taken..];
                if self.head_bytes < HEADER {
                    return Ok(());
                }
            }
            let (channel, length) = self.parse()?;
            if self.body.is_empty() {
                self.body.reserve(length.min(RESERVE_MAX));
            }
            let taken = bytes.len().min(length - self.body.len());
            self.body.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if self.body.len() == length {
                self.deliver(channel);
            }
        }
        Ok(())
    }

    fn parse(&self) -> Result<(Channel, usize), Fault> {
        let word = u64::from_le_bytes(self.head);
        let length = word & ((1 << 56) - 1);
        let channel = match word >> 56 {
            0 => Channel::Message,
            1 => Channel::Collective,
            2 => Channel::Goodbye,
            other => return Err(Fault::new(FaultKind::Internal, format!("frame of unknown channel {other}"))),
        };
        if length > BYTES_MAX {
            return Err(Fault::new(FaultKind::Internal, format!("frame of {length} bytes, at most {BYTES_MAX}")));
        }
        Ok((channel, length as usize))
    }

    fn deliver(&mut self, channel: Channel) {
        let body = std::mem::take(&mut self.body);
        self.head_bytes = 0;
        match channel {
            Channel::Message => self.messages.push_back(body),
            Channel::Collective => self.collective.push_back(body),
            Channel::Goodbye => self.goodbye = true,
        }
    }

    /// The oldest whole message of a channel, left in place.
    pub fn has(&self, channel: Channel) -> bool {
        match channel {
            Channel::Message => !self.messages.is_empty(),
            Channel::Collective => !self.collective.is_empty(),
            Channel::Goodbye => self.goodbye,
        }
    }

    /// The oldest whole message of a channel.
    pub fn take(&mut self, channel: Channel) -> Option<Vec<u8>> {
        match channel {
            Channel::Message => self.messages.pop_front(),
            Channel::Collective => self.collective.pop_front(),
            Channel::Goodbye => None,
        }
    }

    /// Lends an allocation for the next message's bytes.
    pub fn lend(&mut self, mut spare: Vec<u8>) {
        if self.body.is_empty() && self.body.capacity() < spare.capacity() {
            spare.clear();
            self.body = spare;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_any_cut_of_the_stream() {
        let sent: [&[u8]; 4] = [b"", b"a", b"hello", &[7; 100]];
        let mut stream = Vec::new();
        for message in sent {
            stream.extend(header(Channel::Message, message.len()));
            stream.extend_from_slice(message);
            stream.extend(header(Channel::Collective, 1));
            stream.push(message.len() as u8);
        }
        for piece in 1..stream.len() {
            let mut inbox = Inbox::default();
            stream.chunks(piece).for_each(|bytes| inbox.feed(bytes).unwrap());
            for message in sent {
                assert_eq!(inbox.take(Channel::Message).unwrap(), message);
                assert_eq!(inbox.take(Channel::Collective).unwrap(), [message.len() as u8]);
            }
            assert!(!inbox.has(Channel::Message) && !inbox.has(Channel::Collective));
        }
    }

    #[test]
    fn a_stream_that_lost_its_place_is_a_fault() {
        assert!(Inbox::default().feed(&[0xff; 8]).is_err());
        assert!(Inbox::default().feed(&[0, 0, 0, 0, 0, 0, 0xff, 0]).is_err());
    }

    #[test]
    fn a_header_alone_reserves_little() {
        let mut inbox = Inbox::default();
        inbox.feed(&header(Channel::Message, 1 << 39)).unwrap();
        inbox.feed(&[1]).unwrap();
        assert!(inbox.body.capacity() <= 2 * RESERVE_MAX);
    }
}
