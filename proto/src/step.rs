//! Steps and their answers on the wire.

use crate::cluster::v1 as wire;
use model::step::{
    Begin, BlockId, Chunk, Guesses, LaneBatch, LaneResult, PromptScores, Sample, Sampling, Score, SeqId,
};

pub fn lane_to_wire(lane: usize, batch: &LaneBatch) -> wire::Lane {
    wire::Lane {
        lane: lane as u32,
        begun: batch.begun.iter().map(begin_to_wire).collect(),
        chunks: batch.chunks.iter().map(chunk_to_wire).collect(),
        ended: batch.ended.iter().map(|s| s.0).collect(),
        guesses: batch.guesses,
    }
}

pub fn lane_from_wire(lane: wire::Lane) -> (usize, LaneBatch) {
    let batch = LaneBatch {
        begun: lane.begun.into_iter().map(begin_from_wire).collect(),
        chunks: lane.chunks.into_iter().map(chunk_from_wire).collect(),
        ended: lane.ended.into_iter().map(SeqId).collect(),
        guesses: lane.guesses,
    };
    (lane.lane as usize, batch)
}

pub fn result_to_wire(lane: usize, result: LaneResult) -> wire::LaneAnswer {
    wire::LaneAnswer {
        lane: lane as u32,
        samples: result.samples.into_iter().map(sample_to_wire).collect(),
        prompt_scores: result
            .prompt_scores
            .into_iter()
            .map(|p| wire::PromptScores {
                seq: p.seq.0,
                start: p.start,
                scores: p.scores.into_iter().map(score_to_wire).collect(),
            })
            .collect(),
        guesses: result.guesses.into_iter().map(|g| wire::Guesses { seq: g.seq.0, tokens: g.tokens }).collect(),
    }
}

pub fn result_from_wire(answer: wire::LaneAnswer) -> (usize, LaneResult) {
    let result = LaneResult {
        samples: answer.samples.into_iter().map(sample_from_wire).collect(),
        prompt_scores: answer
            .prompt_scores
            .into_iter()
            .map(|p| PromptScores {
                seq: SeqId(p.seq),
                start: p.start,
                scores: p.scores.into_iter().map(score_from_wire).collect(),
            })
            .collect(),
        guesses: answer.guesses.into_iter().map(|g| Guesses { seq: SeqId(g.seq), tokens: g.tokens }).collect(),
    };
    (answer.lane as usize, result)
}

fn begin_to_wire(begin: &Begin) -> wire::Begin {
    wire::Begin {
        seq: begin.seq.0,
        sampling: Some(sampling_to_wire(&begin.sampling)),
        prompt_len: begin.prompt_len,
        history: begin.history.clone(),
    }
}

fn begin_from_wire(begin: wire::Begin) -> Begin {
    Begin {
        seq: SeqId(begin.seq),
        sampling: begin.sampling.map_or(Sampling::GREEDY, sampling_from_wire),
        prompt_len: begin.prompt_len,
        history: begin.history,
    }
}

fn chunk_to_wire(chunk: &Chunk) -> wire::Chunk {
    wire::Chunk {
        seq: chunk.seq.0,
        start: chunk.start,
        tokens: chunk.tokens.clone(),
        blocks: chunk.blocks.iter().map(|b| b.0).collect(),
        sample: chunk.sample,
        drafts: chunk.drafts,
    }
}

fn chunk_from_wire(chunk: wire::Chunk) -> Chunk {
    Chunk {
        seq: SeqId(chunk.seq),
        start: chunk.start,
        tokens: chunk.tokens,
        blocks: chunk.blocks.into_iter().map(BlockId).collect(),
        sample: chunk.sample,
        drafts: chunk.drafts,
    }
}

pub fn sampling_to_wire(s: &Sampling) -> wire::Sampling {
    wire::Sampling {
        temperature: s.temperature,
        top_p: s.top_p,
        top_k: s.top_k,
        min_p: s.min_p,
        repetition_penalty: s.repetition_penalty,
        presence_penalty: s.presence_penalty,
        frequency_penalty: s.frequency_penalty,
        bias_ids: s.logit_bias.iter().map(|b| b.0).collect(),
        bias_values: s.logit_bias.iter().map(|b| b.1).collect(),
        suppress: s.suppress.clone(),
        suppress_until: s.suppress_until,
        seed: s.seed,
        choice: s.choice,
        logprobs: s.logprobs.map(u32::from),
        prompt_logprobs: s.prompt_logprobs.map(u32::from),
    }
}

pub fn sampling_from_wire(s: wire::Sampling) -> Sampling {
    let count = |n: u32| n.min(u8::MAX.into()) as u8;
    Sampling {
        temperature: s.temperature,
        top_p: s.top_p,
        top_k: s.top_k,
        min_p: s.min_p,
        repetition_penalty: s.repetition_penalty,
        presence_penalty: s.presence_penalty,
        frequency_penalty: s.frequency_penalty,
        logit_bias: s.bias_ids.into_iter().zip(s.bias_values).collect(),
        suppress: s.suppress,
        suppress_until: s.suppress_until,
        seed: s.seed,
        choice: s.choice,
        logprobs: s.logprobs.map(count),
        prompt_logprobs: s.prompt_logprobs.map(count),
    }
}

fn sample_to_wire(sample: Sample) -> wire::Sample {
    wire::Sample { seq: sample.seq.0, token: sample.token, score: sample.score.map(score_to_wire) }
}

fn sample_from_wire(sample: wire::Sample) -> Sample {
    Sample { seq: SeqId(sample.seq), token: sample.token, score: sample.score.map(score_from_wire) }
}

pub fn score_to_wire(score: Score) -> wire::Score {
    let (best_ids, best_logprobs) = score.best.into_iter().unzip();
    wire::Score { logprob: score.logprob, rank: score.rank, best_ids, best_logprobs }
}

pub fn score_from_wire(score: wire::Score) -> Score {
    let best = score.best_ids.into_iter().zip(score.best_logprobs).collect();
    Score { logprob: score.logprob, rank: score.rank, best }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn score() -> impl Strategy<Value = Score> {
        (-50f32..0.0, any::<u32>(), prop::collection::vec((any::<u32>(), -50f32..0.0), 0..4))
            .prop_map(|(logprob, rank, best)| Score { logprob, rank, best })
    }

    fn sampling() -> impl Strategy<Value = Sampling> {
        (
            0f32..2.0,
            any::<u64>(),
            any::<u32>(),
            prop::option::of(any::<u8>()),
            prop::collection::vec((any::<u32>(), -9f32..9.0), 0..3),
        )
            .prop_map(|(temperature, seed, choice, logprobs, logit_bias)| Sampling {
                temperature,
                seed,
                choice,
                logprobs,
                logit_bias,
                ..Sampling::GREEDY
            })
    }

    proptest! {
        #[test]
        fn a_lane_survives_the_wire(
            lane in 0usize..9,
            seq in any::<u64>(),
            sampling in sampling(),
            tokens in prop::collection::vec(any::<u32>(), 0..9),
            blocks in prop::collection::vec(any::<u32>(), 0..9),
            (sample, drafts, guesses) in any::<(bool, u32, u32)>(),
        ) {
            let batch = LaneBatch {
                begun: vec![Begin { seq: SeqId(seq), sampling, prompt_len: 3, history: tokens.clone() }],
                chunks: vec![Chunk {
                    seq: SeqId(seq), start: 5, tokens, blocks: blocks.into_iter().map(BlockId).collect(), sample, drafts,
                }],
                ended: vec![SeqId(seq ^ 1)],
                guesses,
            };
            prop_assert_eq!(lane_from_wire(lane_to_wire(lane, &batch)), (lane, batch));
        }

        #[test]
        fn a_result_survives_the_wire(
            lane in 0usize..9, seq in any::<u64>(), token in any::<u32>(),
            one in prop::option::of(score()), many in prop::collection::vec(score(), 0..4),
        ) {
            let result = LaneResult {
                samples: vec![Sample { seq: SeqId(seq), token, score: one }],
                guesses: vec![Guesses { seq: SeqId(seq), tokens: vec![token; many.len()] }],
                prompt_scores: vec![PromptScores { seq: SeqId(seq), start: 1, scores: many }],
            };
            prop_assert_eq!(result_from_wire(result_to_wire(lane, result.clone())), (lane, result));
        }
    }
}
