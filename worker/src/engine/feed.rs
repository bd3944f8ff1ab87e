//! Tokens that go from one step into the next without leaving the group: a chunk without tokens goes on from what was drawn
//! behind its sequence's last one, so the step can be asked for before that was answered.

use super::state::Sequences;
use crate::collective::Collective;
use model::fault::{Fault, FaultKind};
use model::step::{LaneBatch, SeqId};
use std::borrow::Cow;

/// What was drawn behind a sequence's last chunk, as far as this rank knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Drawn {
    /// Nothing; or the chunk had drafts, and how far they were right is the scheduler's to say.
    #[default]
    Nothing,
    /// Every tensor rank found the same.
    Everywhere(u32),
    /// Only the lane's leader drew: the others have `None`.
    ByLeader(Option<u32>),
}

/// The lane's part of a step with each token in its place. The tensor ranks of the lane exchange what only their leader
/// knows, if it is needed.
pub fn fed<'a>(
    lane: &'a LaneBatch,
    sequences: &mut Sequences,
    tensor: &mut dyn Collective,
) -> Result<Cow<'a, LaneBatch>, Fault> {
    if !lane.chunks.iter().any(|chunk| chunk.is_fed()) {
        return Ok(Cow::Borrowed(lane));
    }
    let mut filled = lane.clone();
    let mut by_leader: Vec<(usize, Option<u32>)> = Vec::new();
    for (index, chunk) in filled.chunks.iter_mut().enumerate().filter(|(_, chunk)| chunk.is_fed()) {
        match sequences.get(chunk.seq)?.drawn {
            Drawn::Nothing => return Err(nothing(chunk.seq)),
            Drawn::Everywhere(token) => chunk.tokens.push(token),
            Drawn::ByLeader(token) => by_leader.push((index, token)),
        }
    }
    if !by_leader.is_empty() {
        let known: Option<Vec<u32>> = by_leader.iter().map(|(_, token)| *token).collect();
        let tokens = of_leader(known, by_leader.len(), tensor)?;
        for ((index, _), token) in by_leader.iter().zip(tokens) {
            filled.chunks[*index].tokens.push(token);
        }
    }
    Ok(Cow::Owned(filled))
}

/// The `count` words that only the leader has, on every tensor rank: all ranks see the same chunks, so all ask.
pub fn of_leader(known: Option<Vec<u32>>, count: usize, tensor: &mut dyn Collective) -> Result<Vec<u32>, Fault> {
    if tensor.size() == 1 {
        return known.ok_or_else(|| Fault::new(FaultKind::Internal, "a lane of one rank has another leader"));
    }
    let bytes: Vec<u8> = known.unwrap_or_default().iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut all = Vec::new();
    tensor.gather(&bytes, &mut all)?;
    let said = all.first().filter(|said| said.len() == 4 * count);
    let Some(said) = said else {
        let lengths: Vec<usize> = all.iter().map(Vec::len).collect();
        let text = format!("ranks gathered {lengths:?} bytes of {count} words that the first one knows");
        return Err(Fault::new(FaultKind::Diverged, text));
    };
    Ok(said.chunks_exact(4).map(|bytes| u32::from_le_bytes(bytes.try_into().expect("four bytes"))).collect())
}

fn nothing(seq: SeqId) -> Fault {
    let text = format!("sequence {} has a chunk of no tokens, and no token was drawn behind its last one", seq.0);
    Fault::new(FaultKind::Internal, text)
}
