//! The harmony format of gpt-oss: an answer is a series of messages, each with a header that names its channel. What the
//! `final` channel says is the answer, `analysis` is the reasoning, and a `commentary` addressed to somebody is a call.
//!
//! ```text
//! <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
//! <|start|>assistant to=functions.name<|channel|>commentary <|constrain|>json<|message|>{...}<|call|>
//! ```

use super::tokenizer::Tokenizer;

/// The template of checkpoints that bring none.
pub const TEMPLATE: &str = include_str!("harmony.jinja");

/// Longest header that is kept; what is longer names nothing.
const HEADER_BYTES_MAX: usize = 1024;

/// The format's control tokens in a vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Harmony {
    start: u32,
    channel: u32,
    constrain: u32,
    message: u32,
    end: u32,
    call: u32,
    finish: u32,
}

impl Harmony {
    /// For a vocabulary that has all of them.
    pub fn of(tokenizer: &Tokenizer) -> Option<Harmony> {
        let special = |text: &str| tokenizer.token_id(text).filter(|id| tokenizer.is_special(*id));
        Some(Harmony {
            start: special("<|start|>")?,
            channel: special("<|channel|>")?,
            constrain: special("<|constrain|>")?,
            message: special("<|message|>")?,
            end: special("<|end|>")?,
            call: special("<|call|>")?,
            finish: special("<|return|>")?,
        })
    }

    /// The ids that end an answer: a call waits for its result.
    pub fn end_tokens(&self) -> [u32; 2] {
        [self.finish, self.call]
    }

    /// A reader of the answer to a prompt: its last message may have begun already.
    pub fn reader(self, tokenizer: &Tokenizer, prompt: &[u32]) -> Reader {
        let mut reader = Reader { harmony: self, place: Place::Between, calls: 0, called: false };
        let begin = prompt.iter().rposition(|id| *id == self.start).unwrap_or(prompt.len());
        for id in &prompt[begin..] {
            reader.push(*id, &tokenizer.token_text(*id));
        }
        reader
    }
}

/// Where a piece of an answer belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Part of a header, or nothing at all.
    Nothing,
    Content,
    Reasoning,
    /// The arguments of the call of this number. `name` is told once, with the call's first part.
    Call {
        index: u32,
        name: Option<String>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Between,
    Header(String),
    Body(Channel),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Channel {
    Final,
    Analysis,
    Call(u32),
}

/// Follows one answer, token by token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reader {
    harmony: Harmony,
    place: Place,
    calls: u32,
    called: bool,
}

impl Reader {
    /// Takes a token with the text that it completed, and tells where that text belongs.
    pub fn push(&mut self, id: u32, text: &str) -> Part {
        let tokens = self.harmony;
        if id == tokens.start {
            self.place = Place::Header(String::new());
            return Part::Nothing;
        }
        if id == tokens.end || id == tokens.finish || id == tokens.call {
            self.called |= id == tokens.call && matches!(self.place, Place::Body(Channel::Call(_)));
            self.place = Place::Between;
            return Part::Nothing;
        }
        if id == tokens.message {
            return self.begin_body();
        }
        if id == tokens.channel || id == tokens.constrain {
            // An answer may go on without a start of its own.
            let sign = if id == tokens.channel { " channel=" } else { " " };
            match &mut self.place {
                Place::Header(header) => header.push_str(sign),
                _ => self.place = Place::Header(sign.into()),
            }
            return Part::Nothing;
        }
        match &mut self.place {
            Place::Header(header) => {
                if header.len() + text.len() <= HEADER_BYTES_MAX {
                    header.push_str(text);
                }
                Part::Nothing
            }
            _ => self.here(),
        }
    }

    /// Where text belongs that comes now.
    pub fn here(&self) -> Part {
        match &self.place {
            Place::Header(_) => Part::Nothing,
            // A model that writes no headers at all is taken at its word.
            Place::Between | Place::Body(Channel::Final) => Part::Content,
            Place::Body(Channel::Analysis) => Part::Reasoning,
            Place::Body(Channel::Call(index)) => Part::Call { index: *index, name: None },
        }
    }

    /// Whether the answer ended with a call that waits for its result.
    pub fn called(&self) -> bool {
        self.called
    }

    fn begin_body(&mut self) -> Part {
        let header = match std::mem::replace(&mut self.place, Place::Between) {
            Place::Header(header) => header,
            _ => String::new(),
        };
        let word = |key: &str| {
            header.split_whitespace().find_map(|word| word.strip_prefix(key)).filter(|word| !word.is_empty())
        };
        let channel = match (word("channel="), word("to=")) {
            (Some("analysis"), None) => Channel::Analysis,
            (_, Some(recipient)) if recipient != "user" && recipient != "all" => {
                let bare = recipient.strip_prefix("functions.").filter(|name| !name.is_empty());
                let name = bare.unwrap_or(recipient).to_string();
                let index = self.calls;
                self.calls += 1;
                self.place = Place::Body(Channel::Call(index));
                return Part::Call { index, name: Some(name) };
            }
            // A commentary for everybody introduces what follows.
            _ => Channel::Final,
        };
        self.place = Place::Body(channel);
        Part::Nothing
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::text::tokenizer::TokenizerConfig;
    use crate::text::tokenizer::tests::byte_level_json;
    use serde_json::json;
    use std::sync::Arc;

    pub fn tokenizer() -> Arc<Tokenizer> {
        let mut json = byte_level_json();
        let marks = ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"];
        let special = |(id, text)| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        json["added_tokens"] = (300..).zip(marks).map(special).collect();
        json["post_processor"] = json!(null);
        Arc::new(Tokenizer::from_json(&serde_json::to_vec(&json).unwrap(), &TokenizerConfig::default()).unwrap())
    }

    /// Content, reasoning and calls of an answer.
    fn read(prompt: &str, answer: &str) -> (String, String, Vec<(String, String)>, bool) {
        let tokenizer = tokenizer();
        let encode = |text: &str| tokenizer.encode(text, false).unwrap();
        let mut reader = Harmony::of(&tokenizer).unwrap().reader(&tokenizer, &encode(prompt));
        let (mut content, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
        for id in encode(answer) {
            let special = tokenizer.is_special(id);
            let text = if special { String::new() } else { tokenizer.token_text(id) };
            match reader.push(id, &text) {
                Part::Nothing => {}
                Part::Content => content += &text,
                Part::Reasoning => reasoning += &text,
                Part::Call { index, name } => {
                    if let Some(name) = name {
                        assert_eq!(index as usize, calls.len());
                        calls.push((name, String::new()));
                    }
                    calls[index as usize].1 += &text;
                }
            }
        }
        (content, reasoning, calls, reader.called())
    }

    const PROMPT: &str = "<|start|>user<|message|>hi<|end|><|start|>assistant";

    #[test]
    fn channels_are_told_apart() {
        let answer =
            "<|channel|>analysis<|message|>hm, so<|end|><|start|>assistant<|channel|>final<|message|>Hello<|return|>";
        assert_eq!(read(PROMPT, answer), ("Hello".into(), "hm, so".into(), vec![], false));
    }

    #[test]
    fn a_commentary_to_somebody_is_a_call() {
        let answer = "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>\
            <|start|>assistant to=functions.get<|channel|>commentary <|constrain|>json<|message|>{\"a\": 1}<|call|>";
        let calls = vec![("get".to_string(), "{\"a\": 1}".to_string())];
        assert_eq!(read(PROMPT, answer), ("I look.".into(), "x".into(), calls.clone(), true));
        let other = "<|channel|>commentary to=functions.get <|constrain|>json<|message|>{\"a\": 1}<|call|>";
        assert_eq!(read(PROMPT, other), (String::new(), String::new(), calls, true));
        let (_, _, calls, _) = read(PROMPT, "<|channel|>commentary to=functions.<|message|>{}<|call|>");
        assert_eq!(calls, [("functions.".to_string(), "{}".to_string())], "no call without a name");
        let (_, _, calls, _) = read(PROMPT, "<|channel|>analysis to=python code<|message|>1+1<|call|>");
        assert_eq!(calls, [("python".to_string(), "1+1".to_string())]);
    }

    #[test]
    fn an_answer_may_begin_inside_a_message() {
        let continued = format!("{PROMPT}<|channel|>final<|message|>Sure, ");
        assert_eq!(read(&continued, "yes<|return|>").0, "yes");
        assert_eq!(read("no marks", "plain text").0, "plain text");
        assert_eq!(read(&format!("{PROMPT}<|channel|>analysis<|message|>"), "so").1, "so");
    }

    #[test]
    fn a_vocabulary_without_the_marks_is_another_format() {
        assert_eq!(Harmony::of(&crate::text::tokenizer::tests::byte_level()), None);
    }
}
