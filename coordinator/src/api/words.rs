//! Text as the API needs it: one place that knows the tokenizer, the chat template, the detokeniser and stop strings.
//! (Bytes stand in for a vocabulary until the text module is merged.)

use serde_json::{Map, Value};

pub struct Words;

impl Words {
    pub fn encode(&self, text: &str, _add_special: bool) -> Result<Vec<u32>, String> {
        Ok(text.bytes().map(u32::from).collect())
    }

    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> Result<String, String> {
        let bytes: Vec<u8> =
            tokens.iter().filter(|&&t| !(skip_special && t >= 256)).flat_map(|&t| self.token_bytes(t)).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    pub fn token_bytes(&self, token: u32) -> Vec<u8> {
        if token < 256 { vec![token as u8] } else { b"<end>".to_vec() }
    }

    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        prompt: bool,
        _: &Map<String, Value>,
    ) -> Result<String, String> {
        let mut text = String::new();
        for message in messages {
            let (role, content) = (message["role"].as_str().unwrap_or(""), message["content"].as_str().unwrap_or(""));
            if role == "bad" {
                return Err("unknown role".into());
            }
            text += &format!("{role}:{content}\n");
        }
        text += if tools.is_some() { "tools\n" } else { "" };
        Ok(text + if prompt { ">" } else { "" })
    }

    pub fn detokenizer(&self, _prompt: &[u32], skip_special: bool) -> Detokenizer {
        Detokenizer { held: Vec::new(), skip_special }
    }
}

pub struct Detokenizer {
    held: Vec<u8>,
    skip_special: bool,
}

impl Detokenizer {
    pub fn push(&mut self, token: u32) -> String {
        if token >= 256 && self.skip_special {
            return String::new();
        }
        self.held.extend(Words.token_bytes(token));
        match std::str::from_utf8(&self.held) {
            Ok(text) => {
                let text = text.to_string();
                self.held.clear();
                text
            }
            Err(error) if error.error_len().is_none() => String::new(),
            Err(_) => self.flush(),
        }
    }

    pub fn flush(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned()
    }
}

pub struct StopStrings {
    stops: Vec<String>,
    include: bool,
    held: String,
}

impl StopStrings {
    pub fn new(stops: &[String], include: bool) -> StopStrings {
        StopStrings { stops: stops.to_vec(), include, held: String::new() }
    }

    pub fn push(&mut self, text: &str) -> (String, Option<String>) {
        self.held.push_str(text);
        let hit = self.stops.iter().filter_map(|s| self.held.find(s.as_str()).map(|at| (at, s))).min();
        if let Some((at, stop)) = hit {
            let end = if self.include { at + stop.len() } else { at };
            return (self.held[..end].to_string(), Some(stop.clone()));
        }
        let keep = (0..self.held.len())
            .filter(|&at| self.held.is_char_boundary(at))
            .find(|&at| self.stops.iter().any(|s| s.starts_with(&self.held[at..])))
            .unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, rest), None)
    }

    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
