//! Asks the kernel for windows before they are packed, so that the disk reads while the processor packs: a file that
//! is not in memory would otherwise be read in the small steps of page faults, each waited for.

use memmap2::{Advice, Mmap};
use model::catalog::{Role, TensorId};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Bytes that are asked for beyond the windows in use: enough for a fast disk's queue, little beside any model.
const AHEAD_BYTES: u64 = 256 << 20;
/// Asked for at a time. Linux follows such advice only as far as a device's longest request goes.
const CHUNK_BYTES: usize = 256 << 10;

/// Some bytes of a mapped file.
pub struct Span {
    pub map: Arc<Mmap>,
    pub bytes: Range<usize>,
}

/// The windows of a rank in the order that the engine takes them, about, and a thread that asks for them.
pub struct Ahead {
    places: BTreeMap<TensorId, usize>,
    thread: Option<(SyncSender<usize>, JoinHandle<()>)>,
}

impl Ahead {
    /// Of each declared tensor of the rank the bytes around its window, in the order of the declarations.
    pub fn new(windows: Vec<(TensorId, Span)>) -> Ahead {
        let (ids, spans): (Vec<TensorId>, Vec<Span>) = ordered(windows).into_iter().unzip();
        // Places that come too fast to be taken are of no interest: later ones say more.
        let (sender, places) = sync_channel(64);
        let thread = std::thread::Builder::new().name("read ahead".into()).spawn(move || run(&spans, &places));
        Ahead {
            places: ids.into_iter().enumerate().map(|(place, id)| (id, place)).collect(),
            // Without a thread the pages come when they are touched.
            thread: thread.ok().map(|thread| (sender, thread)),
        }
    }

    /// Called for each window before it is used.
    pub fn reach(&self, id: TensorId) {
        if let (Some(place), Some((sender, _))) = (self.places.get(&id), &self.thread) {
            let _ = sender.try_send(*place);
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.thread.take() {
            drop(sender);
            let _ = thread.join();
        }
    }
}

fn ordered(mut windows: Vec<(TensorId, Span)>) -> Vec<(TensorId, Span)> {
    windows.sort_by_key(|(id, _)| order(id));
    windows
}

/// A layer's experts come last, gate and up of each together; else a stable sort keeps the declarations' order.
pub fn order(id: &TensorId) -> (Option<usize>, bool, bool, Option<usize>) {
    (id.layer, is_expert(id.role), id.role == Role::ExpertDown, id.expert)
}

/// Stays [`AHEAD_BYTES`] ahead of the end of the last place that was told.
fn run(spans: &[Span], places: &Receiver<usize>) {
    let bytes = |place: usize| spans[place].bytes.len() as u64;
    // Places before `next` were asked for or are past, those before `end` are in use or past; bytes of each.
    let (mut next, mut asked, mut end, mut used) = (0, 0, 0, 0);
    while let Ok(place) = places.recv() {
        let place = places.try_iter().last().unwrap_or(place);
        while end <= place {
            used += bytes(end);
            end += 1;
        }
        while next < spans.len() && asked <= used + AHEAD_BYTES {
            if next >= place {
                will_need(&spans[next]);
            }
            asked += bytes(next);
            next += 1;
        }
    }
}

fn will_need(span: &Span) {
    for from in span.bytes.clone().step_by(CHUNK_BYTES) {
        let length = CHUNK_BYTES.min(span.bytes.end - from);
        // Only advice: nothing depends on whether it is followed.
        let _ = span.map.advise_range(Advice::WillNeed, from, length);
    }
}

fn is_expert(role: Role) -> bool {
    matches!(role, Role::ExpertGate | Role::ExpertUp | Role::ExpertDown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_experts_gate_and_up_stand_together() {
        let id = |layer, role, expert| TensorId { layer, role, expert };
        let windows = [
            (None, Role::Embedding, None),
            (Some(0), Role::Query, None),
            (Some(0), Role::ExpertGate, Some(0)),
            (Some(0), Role::ExpertGate, Some(1)),
            (Some(0), Role::ExpertUp, Some(0)),
            (Some(0), Role::ExpertUp, Some(1)),
            (Some(0), Role::ExpertDown, Some(0)),
        ];
        let map = Arc::new(memmap2::MmapMut::map_anon(4096).unwrap().make_read_only().unwrap());
        let span = |_| Span { map: map.clone(), bytes: 0..3 };
        let ahead = Ahead::new(windows.iter().map(|(l, r, e)| (id(*l, *r, *e), span(l))).collect());
        let place = |role, expert| ahead.places[&id(Some(0), role, Some(expert))];
        assert_eq!(place(Role::ExpertUp, 0), place(Role::ExpertGate, 0) + 1);
        assert!(place(Role::ExpertGate, 1) > place(Role::ExpertUp, 0));
        assert!(place(Role::ExpertDown, 0) > place(Role::ExpertUp, 1));
        assert_eq!(ahead.places[&id(None, Role::Embedding, None)], 0);
        ahead.places.keys().for_each(|id| ahead.reach(*id));
    }
}
