//! The rows over which a step's guessers run: tokens that became known with it, those just drawn among them.

use super::batch::{Batch, Resolved, Sequence};
use super::state::Sequences;
use model::fault::Fault;
use model::plan::BLOCK_TOKENS;
use model::step::SeqId;

/// A sequence as guessers know it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Foreseen {
    /// Its first position with a row of predictors. What is cached before was predicted by another sequence's steps.
    from: usize,
    /// Tokens that were known after the last step; of those a draft model has taken in as many as there was room for. `None` before
    /// the first.
    known: Option<usize>,
    /// By predictor: the row that its next one goes on from, normed.
    pub tails: Vec<Vec<f32>>,
}

impl Foreseen {
    pub fn new(predictors: usize) -> Foreseen {
        Foreseen { tails: vec![Vec::new(); predictors], ..Foreseen::default() }
    }
}

/// What was drawn behind a chunk: so many of its drafts again, and then a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Behind {
    pub seq: SeqId,
    pub guessed: usize,
    pub token: u32,
}

/// One guesser's part of a step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ahead {
    pub batch: Batch,
    /// Token that each row takes in. Of a predictor's: the one that the row before it foretold.
    pub ids: Vec<u32>,
    /// Of a predictor's rows: which each goes on from, of this step's (of the predictor's before); `None` for one kept from the
    /// step before.
    pub from: Vec<Option<u32>>,
    /// Whose each of the batch's spans is.
    pub sequences: Vec<SeqId>,
    /// Rows (of this step's, or of the predictor's before) that the next step goes on from.
    pub kept: Vec<(SeqId, u32)>,
    /// The spans whose last row takes in what was just drawn: it foretells what is to be guessed.
    pub drawn: Vec<usize>,
}

impl Ahead {
    pub fn rows(&self) -> usize {
        self.ids.len()
    }
}

/// A sequence's part of a step, without the rows of drafts that were not drawn again: they foretell nothing.
struct Told<'a> {
    seq: SeqId,
    /// Its rows in the step begin here, at position `start`.
    row: usize,
    start: usize,
    tokens: &'a [u32],
    drawn: Option<&'a Behind>,
    span: &'a Sequence,
}

impl Told<'_> {
    fn end(&self) -> usize {
        self.start + self.tokens.len()
    }

    /// Tokens known now.
    fn known(&self) -> usize {
        self.end() + usize::from(self.drawn.is_some())
    }

    fn token(&self, position: usize) -> u32 {
        match self.tokens.get(position - self.start) {
            Some(token) => *token,
            None => self.drawn.expect("nothing else is known behind a chunk").token,
        }
    }
}

/// All sequences of a step that drew `behind`, in the order of chunks.
fn told<'a>(sequences: &mut Sequences, resolved: &'a Resolved, behind: &'a [Behind]) -> Result<Vec<Told<'a>>, Fault> {
    let mut all = Vec::with_capacity(resolved.sequences.len());
    let mut behind = behind.iter().peekable();
    for (span, &seq) in resolved.batch.spans.iter().zip(&resolved.sequences) {
        let drawn = behind.next_if(|drawn| drawn.seq == seq);
        let drafts = sequences.get(seq)?.drafts.len();
        let rows = span.rows - drawn.map_or(0, |drawn| drafts - drawn.guessed);
        let tokens = &resolved.ids[span.row..span.row + rows];
        all.push(Told { seq, row: span.row, start: span.start, tokens, drawn, span });
    }
    Ok(all)
}

/// What each predictor runs over in a step that drew `behind`.
pub fn predicted(sequences: &mut Sequences, resolved: &Resolved, behind: &[Behind]) -> Result<Vec<Ahead>, Fault> {
    let mut all = vec![Ahead::default(); sequences.predictors()];
    for told in told(sequences, resolved, behind)? {
        let Told { seq, start, .. } = told;
        let foreseen = &mut sequences.get(seq)?.foreseen;
        let begins = foreseen.known.is_none();
        let before_known = *foreseen.known.get_or_insert(start);
        if begins || start > before_known {
            foreseen.from = start;
        }
        foreseen.known = Some(told.known());
        // Positions of the rows that a predictor goes on from, and the first one's row.
        let (mut before, mut first) = (start..told.end(), told.row);
        for (index, ahead) in all.iter_mut().enumerate() {
            // The row at `p` takes in the token at `p + lag`.
            let lag = index + 1;
            let at = |known: usize| known.saturating_sub(lag).max(foreseen.from);
            let (row, positions) = (ahead.rows(), at(before_known)..at(told.known()));
            if !before.is_empty() && before.end > positions.end {
                ahead.kept.push((seq, (first + before.len() - 1) as u32));
            }
            if !positions.is_empty() {
                let of = |p: usize| p.checked_sub(before.start).map(|i| (first + i) as u32);
                ahead.from.extend(positions.clone().map(of));
                ahead.push(&told, positions.clone(), lag);
            }
            (before, first) = (positions, row);
        }
    }
    Ok(all)
}

/// What a draft model, which takes `len_max` positions, runs over in a step that drew `behind`: every token that it has not taken in
/// yet. What was drawn last waits where its position has no block yet.
pub fn drafted(
    sequences: &mut Sequences,
    resolved: &Resolved,
    behind: &[Behind],
    len_max: usize,
) -> Result<Ahead, Fault> {
    let mut ahead = Ahead::default();
    for told in told(sequences, resolved, behind)? {
        let foreseen = &mut sequences.get(told.seq)?.foreseen;
        // A prefix that was cached has been taken in by whoever computed it.
        let from = foreseen.known.map_or(told.start, |known| known.max(told.start));
        let to = told.known().min(told.span.blocks.len() * BLOCK_TOKENS).min(len_max);
        if from < to {
            ahead.push(&told, from..to, 0);
        }
        foreseen.known = Some(to.max(from));
    }
    Ok(ahead)
}

impl Ahead {
    /// Rows of a sequence at `positions`, which is not empty; each takes in the token `lag` further on.
    fn push(&mut self, told: &Told<'_>, positions: std::ops::Range<usize>, lag: usize) {
        let (row, rows, start) = (self.rows(), positions.len(), positions.start);
        if told.drawn.is_some() && positions.end + lag == told.known() {
            self.drawn.push(self.sequences.len());
        }
        self.ids.extend(positions.clone().map(|p| told.token(p + lag)));
        self.batch.positions.extend(positions.map(|p| p as u32));
        self.batch.spans.push(Sequence { row, rows, start, blocks: told.span.blocks.clone() });
        self.sequences.push(told.seq);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::plan::Limits;
    use model::step::{Begin, BlockId, Chunk, LaneBatch, Sampling};

    const LIMITS: Limits = Limits { model_len_max: 100, step_tokens_max: 50, step_sequences_max: 2, blocks: 4 };

    /// What two predictors run over in a step of `chunks`: sequence, start, tokens, drafts among them, blocks, and what was drawn.
    type Asked<'a> = (u64, u32, &'a [u32], u32, &'a [u32], Option<(usize, u32)>);

    /// The rows of its predictors, or, for `len_max` positions, of a draft model.
    fn run(sequences: &mut Sequences, begun: &[u64], chunks: &[Asked<'_>], len_max: Option<usize>) -> Vec<Ahead> {
        let begin = |seq: &u64| Begin { seq: SeqId(*seq), sampling: Sampling::GREEDY, prompt_len: 3, history: vec![] };
        let chunk = |&(seq, start, tokens, drafts, blocks, _): &Asked<'_>| {
            let blocks = blocks.iter().map(|&b| BlockId(b)).collect();
            Chunk { seq: SeqId(seq), start, tokens: tokens.to_vec(), blocks, sample: true, drafts }
        };
        let begun = begun.iter().map(begin).collect();
        let lane = LaneBatch { begun, chunks: chunks.iter().map(chunk).collect(), ..LaneBatch::default() };
        let resolved = sequences.resolve(&lane, false).unwrap();
        let behind =
            |&(seq, .., drawn): &Asked<'_>| drawn.map(|(guessed, token)| Behind { seq: SeqId(seq), guessed, token });
        let behind = chunks.iter().filter_map(behind).collect::<Vec<_>>();
        match len_max {
            None => predicted(sequences, &resolved, &behind).unwrap(),
            Some(len_max) => vec![drafted(sequences, &resolved, &behind, len_max).unwrap()],
        }
    }

    fn step(sequences: &mut Sequences, begun: &[u64], chunks: &[Asked<'_>]) -> Vec<Ahead> {
        run(sequences, begun, chunks, None)
    }

    #[test]
    fn predictors_wait_for_tokens_and_go_on_from_what_was_kept() {
        let mut sequences = Sequences::new(LIMITS, 10).predicting(2);
        let found = step(&mut sequences, &[1], &[(1, 0, &[1], 0, &[0], None)]);
        assert_eq!((found[0].rows(), found[1].rows()), (0, 0), "the next token is not known");
        assert_eq!((&found[0].kept[..], &found[1].kept[..]), (&[(SeqId(1), 0)][..], &[][..]));
        let chunks: [Asked<'_>; 2] = [(2, 0, &[4, 5, 6], 0, &[1], None), (1, 1, &[2, 3], 0, &[], None)];
        let found = step(&mut sequences, &[2], &chunks);
        assert_eq!((&found[0].ids[..], &found[0].batch.positions[..]), (&[5, 6, 2, 3][..], &[0, 1, 0, 1][..]));
        assert_eq!(found[0].from, [Some(0), Some(1), None, Some(3)]);
        assert_eq!(found[0].kept, [(SeqId(2), 2), (SeqId(1), 4)]);
        assert_eq!((&found[1].ids[..], &found[1].batch.positions[..]), (&[6, 3][..], &[0, 0][..]));
        assert_eq!(found[1].from, [Some(0), Some(2)]);
        assert_eq!(found[1].kept, [(SeqId(2), 1), (SeqId(1), 3)]);
        let third = step(&mut sequences, &[], &[(1, 3, &[7], 0, &[], None)]);
        assert_eq!((&third[0].from[..], &third[1].from[..]), (&[None][..], &[None][..]));
        assert_eq!((third[0].batch.spans[0].start, third[1].batch.spans[0].start), (2, 1));
    }

    #[test]
    fn what_was_drawn_is_taken_in_at_once_and_drafts_only_as_far_as_they_were_right() {
        let mut sequences = Sequences::new(LIMITS, 10).predicting(2);
        let found = step(&mut sequences, &[1], &[(1, 0, &[1, 2, 3], 0, &[0], Some((0, 4)))]);
        assert_eq!((&found[0].ids[..], &found[0].from[..]), (&[2, 3, 4][..], &[Some(0), Some(1), Some(2)][..]));
        assert_eq!((&found[1].ids[..], &found[1].from[..]), (&[3, 4][..], &[Some(0), Some(1)][..]));
        assert_eq!((&found[0].kept[..], &found[1].kept[..]), (&[][..], &[(SeqId(1), 2)][..]));
        // Of three drafts one is right, and 9 is drawn behind it.
        let found = step(&mut sequences, &[], &[(1, 3, &[4, 5, 6, 7], 3, &[], Some((1, 9)))]);
        assert_eq!((&found[0].ids[..], &found[0].from[..]), (&[5, 9][..], &[Some(0), Some(1)][..]));
        assert_eq!(found[0].batch.positions, [3, 4]);
        assert_eq!((&found[1].ids[..], &found[1].from[..]), (&[5, 9][..], &[None, Some(0)][..]));
        assert_eq!(found[1].batch.positions, [2, 3]);
        let found = step(&mut sequences, &[], &[(1, 5, &[9], 0, &[], Some((0, 2)))]);
        assert_eq!((&found[0].batch.positions[..], &found[1].batch.positions[..]), (&[5][..], &[4][..]));
    }

    /// Tokens, first position and whether the last row foretells a guess, of a draft model's only sequence; nothing where it has no rows.
    fn taken(ahead: &[Ahead]) -> Option<(&[u32], usize, bool)> {
        let rows = &ahead[0];
        Some((&rows.ids, rows.batch.spans.first()?.start, rows.drawn == [0]))
    }

    #[test]
    fn a_draft_model_takes_in_every_token_once_it_is_known() {
        let mut sequences = Sequences::new(LIMITS, 10);
        let mut step = |begun: &[u64], chunk: Asked<'_>| run(&mut sequences, begun, &[chunk], Some(100));
        assert_eq!(taken(&step(&[1], (1, 0, &[1, 2], 0, &[0], None))), Some((&[1, 2][..], 0, false)));
        // What was drawn is taken in at once.
        assert_eq!(taken(&step(&[], (1, 2, &[3], 0, &[], Some((0, 4))))), Some((&[3, 4][..], 2, true)));
        // Of three drafts two are right, and 9 is drawn behind them.
        let found = step(&[], (1, 3, &[4, 5, 6, 7], 3, &[], Some((2, 9))));
        assert_eq!(taken(&found), Some((&[5, 6, 9][..], 4, true)));
        assert_eq!(taken(&step(&[], (1, 6, &[9], 0, &[], Some((0, 8))))), Some((&[8][..], 7, true)));
        // A prefix that is cached was taken in before.
        let found = run(&mut sequences, &[2], &[(2, 32, &[1, 2], 0, &[2, 3], Some((0, 3)))], Some(100));
        assert_eq!(taken(&found), Some((&[1, 2, 3][..], 32, true)));
    }

    #[test]
    fn a_draft_model_waits_for_a_block_and_ends_at_its_length() {
        let mut sequences = Sequences::new(LIMITS, 10);
        let found = run(&mut sequences, &[1], &[(1, 0, &[1; 32], 0, &[0], Some((0, 4)))], Some(34));
        assert_eq!(taken(&found), Some((&[1; 32][..], 0, false)), "4 has no block yet");
        let mut step = |chunk: Asked<'_>| run(&mut sequences, &[], &[chunk], Some(34));
        assert_eq!(taken(&step((1, 32, &[4], 0, &[1], Some((0, 5))))), Some((&[4, 5][..], 32, true)));
        assert_eq!(taken(&step((1, 33, &[5], 0, &[], Some((0, 6))))), None, "34 positions are all");
        assert_eq!(taken(&step((1, 34, &[6], 0, &[], Some((0, 7))))), None);
    }
}
