//! From a job's outputs to pieces of text: detokenising, stop strings, counting. Pure: it is pushed outputs and yields
//! [`Piece`]s, which both the streamed and the whole answer are made of.

use std::collections::VecDeque;
use std::sync::Arc;

use model::step::Score;

use super::request::Wording;
use crate::schedule::job::{DoneReason, Output, Refusal};
use crate::text::harmony::{Part, Reader};
use crate::text::{Detokenizer, StopStrings, Tokenizer};

/// What one prompt of a request is, for its answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    pub tokens: Vec<u32>,
    /// The text that `echo` repeats.
    pub echo: Option<String>,
    /// Wait for the prompt's scores before echoing it.
    pub scored: bool,
    /// Tells the channels of the answer apart, where the model writes in channels.
    pub reader: Option<Reader>,
}

/// The next part of one choice.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Piece {
    /// Over all prompts: `prompt * n + choice`.
    pub index: usize,
    pub prompt: usize,
    /// May be empty while a character or a stop string is incomplete.
    pub text: String,
    /// What the model says to itself.
    pub reasoning: String,
    /// A part of a call.
    pub call: Option<CallPart>,
    pub tokens: Vec<Told>,
    /// The tokens are the prompt's, repeated.
    pub echo: bool,
    /// Set in the last piece of a choice.
    pub finish: Option<Finish>,
}

/// The next part of a call: its name first, then its arguments as they are written.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct CallPart {
    pub index: u32,
    pub name: Option<String>,
    pub arguments: String,
}

/// A token as it is reported.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    pub token: u32,
    pub score: Option<Score>,
    /// Characters of this choice's tokens before it.
    pub offset: usize,
}

/// All pieces of one choice together.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Choice {
    pub prompt: usize,
    pub text: String,
    pub reasoning: String,
    /// Names and arguments.
    pub calls: Vec<(String, String)>,
    /// The prompt's, where echoed, then the answer's.
    pub tokens: Vec<Told>,
    /// How many of `tokens` are the prompt's.
    pub echoed: usize,
    pub finish: Option<Finish>,
}

impl Choice {
    pub fn add(&mut self, piece: Piece) {
        self.prompt = piece.prompt;
        self.text.push_str(&piece.text);
        self.reasoning.push_str(&piece.reasoning);
        if let Some(part) = piece.call {
            if let Some(name) = part.name {
                self.calls.push((name, String::new()));
            }
            if let Some((_, arguments)) = self.calls.get_mut(part.index as usize) {
                arguments.push_str(&part.arguments);
            }
        }
        self.echoed += if piece.echo { piece.tokens.len() } else { 0 };
        self.tokens.extend(piece.tokens);
        self.finish = piece.finish.or(self.finish.take());
    }

    /// Ids of the answer's tokens.
    pub fn token_ids(&self) -> Vec<u32> {
        self.tokens[self.echoed..].iter().map(|told| told.token).collect()
    }
}

/// Why a choice ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Finish {
    /// The model's own end token.
    End,
    /// An end token of the request's own.
    StopToken(u32),
    /// A stop string.
    Stop(String),
    Length,
    /// A call that waits for its result.
    Call,
}

impl Finish {
    /// OpenAI's word for it.
    pub fn reason(&self) -> &'static str {
        match self {
            Finish::End | Finish::StopToken(_) | Finish::Stop(_) => "stop",
            Finish::Length => "length",
            Finish::Call => "tool_calls",
        }
    }
}

/// Tokens counted over all prompts and choices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    pub completion_tokens: usize,
}

/// All answers of a request.
pub struct Answers {
    tokenizer: Arc<Tokenizer>,
    wording: Wording,
    end_tokens: Vec<u32>,
    prompts: Vec<Prompt>,
    /// Choices of prompt 0, then of prompt 1, and so on.
    voices: Vec<Voice>,
    choices: usize,
    pub usage: Usage,
    ready: VecDeque<Piece>,
}

/// One choice being written.
struct Voice {
    detokenizer: Detokenizer,
    stops: StopStrings,
    reader: Option<Reader>,
    tokens: u32,
    /// Where the answer begins in the choice's text, in characters: behind an echo.
    offset: usize,
    /// The end token drawn, until `Done` confirms it.
    end: Option<u32>,
    echoed: bool,
    finished: bool,
}

impl Voice {
    /// Passes text by the stop strings: what is certain now, and the one that was met.
    fn release(&mut self, text: &str) -> (String, Option<usize>) {
        let released = self.stops.push(text);
        (released.text, released.stop)
    }

    /// Puts text where it belongs in a piece; gives back what is the answer's.
    fn route(part: Part, text: String, piece: &mut Piece) -> String {
        match part {
            Part::Content => return text,
            Part::Nothing => {}
            Part::Reasoning => piece.reasoning = text,
            Part::Call { name: None, .. } if text.is_empty() => {}
            Part::Call { index, name } => piece.call = Some(CallPart { index, name, arguments: text }),
        }
        String::new()
    }
}

impl Answers {
    /// `choices` for each prompt.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        wording: Wording,
        end_tokens: Vec<u32>,
        prompts: Vec<Prompt>,
        choices: usize,
    ) -> Answers {
        let voice = |prompt: &Prompt| Voice {
            detokenizer: Detokenizer::continuing(Arc::clone(&tokenizer), wording.skip_special),
            stops: wording.stops.clone(),
            reader: prompt.reader.clone(),
            tokens: 0,
            offset: 0,
            end: None,
            echoed: prompt.echo.is_none(),
            finished: false,
        };
        let voices = prompts.iter().flat_map(|prompt| (0..choices).map(move |_| prompt)).map(voice).collect();
        let usage = Usage { prompt_tokens: prompts.iter().map(|p| p.tokens.len()).sum(), ..Usage::default() };
        Answers { tokenizer, wording, end_tokens, prompts, voices, choices, usage, ready: VecDeque::new() }
    }

    /// The number of choices over all prompts.
    pub fn count(&self) -> usize {
        self.voices.len()
    }

    pub fn prompts(&self) -> &[Prompt] {
        &self.prompts
    }

    /// The oldest piece that was not taken yet.
    pub fn take(&mut self) -> Option<Piece> {
        self.ready.pop_front()
    }

    /// Whether all choices of a prompt are finished, so that its job is not needed any more.
    pub fn finished(&self, prompt: usize) -> bool {
        self.voices[prompt * self.choices..][..self.choices].iter().all(|voice| voice.finished)
    }

    /// Takes the next output of a prompt's job. A refusal ends the whole request.
    pub fn push(&mut self, prompt: usize, output: Output) -> Result<(), Refusal> {
        match output {
            Output::Started { cached_tokens } => {
                self.usage.cached_tokens += cached_tokens as usize;
                if !self.prompts[prompt].scored {
                    self.echo(prompt, Vec::new());
                }
            }
            Output::PromptScores(scores) => self.echo(prompt, scores),
            Output::Token { choice, token, score } => self.token(prompt, self.index(prompt, choice)?, token, score),
            Output::Done { choice, reason } => self.done(prompt, self.index(prompt, choice)?, reason),
            Output::Failed(refusal) => return Err(refusal),
            // Whoever carries requests among groups enters them again.
            Output::Moved { .. } => return Err(Refusal::Failed("the group died, and nobody carried this on".into())),
        }
        Ok(())
    }

    fn index(&self, prompt: usize, choice: u32) -> Result<usize, Refusal> {
        if choice as usize >= self.choices {
            return Err(Refusal::Failed(format!("choice {choice} of {} was answered", self.choices)));
        }
        Ok(prompt * self.choices + choice as usize)
    }

    /// Repeats the prompt at the head of each of its choices. `scores` are those of tokens 1.., or none.
    fn echo(&mut self, prompt: usize, scores: Vec<Score>) {
        let Some(text) = &self.prompts[prompt].echo else { return };
        let offset = text.chars().count();
        let mut told = Vec::with_capacity(self.prompts[prompt].tokens.len());
        let mut detokenizer = Detokenizer::new(Arc::clone(&self.tokenizer), self.wording.skip_special);
        // The first token follows nothing, so it has no probability.
        let mut scores = std::iter::once(None).chain(scores.into_iter().map(Some));
        for &token in &self.prompts[prompt].tokens {
            told.push(Told { token, score: scores.next().flatten(), offset: detokenizer.push(token).offset });
        }
        for index in prompt * self.choices..(prompt + 1) * self.choices {
            let voice = &mut self.voices[index];
            if !std::mem::replace(&mut voice.echoed, true) {
                voice.offset = offset;
                let (text, tokens) = (text.clone(), told.clone());
                self.ready.push_back(Piece { index, prompt, text, tokens, echo: true, ..Piece::default() });
            }
        }
    }

    fn token(&mut self, prompt: usize, index: usize, token: u32, score: Option<Score>) {
        let voice = &mut self.voices[index];
        if voice.finished {
            return; // beyond a stop string: the other choices keep the job going
        }
        self.usage.completion_tokens += 1;
        voice.tokens += 1;
        let offset = voice.offset + voice.detokenizer.characters();
        let mut piece = Piece { index, prompt, ..Piece::default() };
        let (text, stop) = if self.end_tokens.contains(&token) {
            voice.end = Some(token);
            if let Some(reader) = &mut voice.reader {
                reader.push(token, "");
            }
            // The end token's own text is shown only on demand, and never looked at for stop strings.
            let own = if self.wording.include_stop { voice.detokenizer.push(token).text } else { String::new() };
            (voice.stops.flush() + &own, None)
        } else {
            let mut text = voice.detokenizer.push(token).text;
            if let Some(reader) = &mut voice.reader {
                let part = reader.push(token, &text);
                text = Voice::route(part, text, &mut piece);
            }
            if voice.tokens <= self.wording.tokens_min { (text, None) } else { voice.release(&text) }
        };
        voice.finished = stop.is_some();
        let finish = stop.map(|which| Finish::Stop(self.wording.stop[which].clone()));
        let told = Told { token, score, offset };
        self.ready.push_back(Piece { text, tokens: vec![told], finish, ..piece });
    }

    fn done(&mut self, prompt: usize, index: usize, reason: DoneReason) {
        let voice = &mut self.voices[index];
        if std::mem::replace(&mut voice.finished, true) {
            return;
        }
        // What was held back as half a character or half a stop string comes out now.
        let mut piece = Piece { index, prompt, ..Piece::default() };
        let mut rest = voice.detokenizer.flush();
        if let Some(reader) = &voice.reader {
            rest = Voice::route(reader.here(), rest, &mut piece);
        }
        let called = voice.reader.as_ref().is_some_and(Reader::called);
        let (mut text, stop) = voice.release(&rest);
        let finish = match (stop, reason, voice.end) {
            (Some(which), ..) => Finish::Stop(self.wording.stop[which].clone()),
            (None, DoneReason::End, Some(token)) if self.wording.stop_tokens.contains(&token) => {
                Finish::StopToken(token)
            }
            (None, DoneReason::End, _) if called => Finish::Call,
            (None, DoneReason::End, _) => Finish::End,
            (None, DoneReason::Length, _) => Finish::Length,
        };
        if !matches!(finish, Finish::Stop(_)) {
            text += &voice.stops.flush();
        }
        self.ready.push_back(Piece { text, finish: Some(finish), ..piece });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Harmony;
    use crate::text::harmony::tests::tokenizer;

    #[test]
    fn channels_and_calls_come_in_pieces_of_their_own() {
        let tokenizer = tokenizer();
        let encode = |text: &str| tokenizer.encode(text, false).unwrap();
        let tokens = encode("<|start|>user<|message|>hi<|end|><|start|>assistant");
        let reader = Harmony::of(&tokenizer).map(|harmony| harmony.reader(&tokenizer, &tokens));
        let prompt = Prompt { tokens, echo: None, scored: false, reader };
        let stop = vec!["STOP".to_string()];
        let wording = Wording {
            stops: StopStrings::new(&stop, false).unwrap(),
            stop,
            stop_tokens: Vec::new(),
            include_stop: false,
            skip_special: true,
            tokens_min: 0,
        };
        let answer = "<|channel|>analysis<|message|>STOP? 世<|end|><|start|>assistant<|channel|>commentary<|message|>I look\
            <|end|><|start|>assistant to=functions.get<|channel|>commentary json<|message|>{\"a\": \"é\"}<|call|>";
        let ends = Harmony::of(&tokenizer).unwrap().end_tokens().to_vec();
        let mut answers = Answers::new(tokenizer.clone(), wording, ends, vec![prompt], 1);
        for token in encode(answer) {
            answers.push(0, Output::Token { choice: 0, token, score: None }).unwrap();
        }
        answers.push(0, Output::Done { choice: 0, reason: DoneReason::End }).unwrap();
        let mut choice = Choice::default();
        let mut parts = 0;
        while let Some(piece) = answers.take() {
            parts += usize::from(piece.call.is_some());
            choice.add(piece);
        }
        assert_eq!((choice.text.as_str(), choice.reasoning.as_str()), ("I look", "STOP? 世"));
        assert_eq!(choice.calls, [("get".to_string(), "{\"a\": \"é\"}".to_string())]);
        assert_eq!(choice.finish, Some(Finish::Call));
        assert!(parts > 5, "arguments are streamed: {parts}");
    }
}
