//! Models cut into several GGUF files, `NAME-00001-of-00003.gguf` and so on. The first holds the metadata; each says
//! which it is.

use super::Value;
use crate::error::SpecError;
use std::collections::BTreeMap;

const COUNT: &str = "split.count";
const NUMBER: &str = "split.no";
const TENSORS: &str = "split.tensors.count";
/// Parts that a name can count.
const PARTS_MAX: u64 = 99_999;

/// The files of one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// What the names begin with.
    prefix: String,
    pub parts: usize,
}

impl Split {
    /// Whether a file of this name and metadata is one of several, and of which.
    pub fn of(name: &str, metadata: &BTreeMap<String, Value>) -> Result<Option<Split>, SpecError> {
        let parts = match metadata.get(COUNT) {
            None => return Ok(None),
            Some(value) => value.as_u64().filter(|n| *n <= PARTS_MAX).ok_or_else(|| {
                SpecError::bad(COUNT, format!("{value:?}"), format!("a number of files up to {PARTS_MAX}"))
            })? as usize,
        };
        if parts <= 1 {
            return Ok(None);
        }
        let of = format!("-of-{parts:05}.gguf");
        let prefix = name.strip_suffix(&of).and_then(|rest| {
            let (prefix, number) = rest.split_at_checked(rest.len().checked_sub(5)?)?;
            number.bytes().all(|b| b.is_ascii_digit()).then(|| prefix.strip_suffix('-'))?
        });
        let prefix = prefix.ok_or_else(|| {
            SpecError::bad(COUNT, parts, format!("{name} is not named like a part of {parts} (NAME-00001{of})"))
        })?;
        Ok(Some(Split { prefix: prefix.into(), parts }))
    }

    /// The name of part `index`, from 0.
    pub fn name(&self, index: usize) -> String {
        format!("{}-{:05}-of-{:05}.gguf", self.prefix, index + 1, self.parts)
    }

    /// Whether the metadata of part `index` says that it is that part.
    pub fn check(&self, index: usize, metadata: &BTreeMap<String, Value>) -> Result<(), SpecError> {
        for (key, wanted) in [(NUMBER, index), (COUNT, self.parts)] {
            let stated = metadata.get(key).and_then(Value::as_u64);
            if stated != Some(wanted as u64) {
                let stated = stated.map_or("no number".into(), |n| n.to_string());
                return Err(SpecError::bad(key, stated, format!("{} should say {wanted}", self.name(index))));
            }
        }
        Ok(())
    }

    /// Whether all parts together hold as many tensors as the first one says.
    pub fn check_tensors(&self, first: &BTreeMap<String, Value>, found: usize) -> Result<(), SpecError> {
        match first.get(TENSORS).and_then(Value::as_u64) {
            Some(stated) if stated != found as u64 => {
                Err(SpecError::bad(TENSORS, stated, format!("the {} parts hold {found}", self.parts)))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(number: u64, count: u64) -> BTreeMap<String, Value> {
        let keys = [(NUMBER, number), (COUNT, count), (TENSORS, 7)];
        keys.into_iter().map(|(key, n)| (key.to_string(), Value::U64(n))).collect()
    }

    #[test]
    fn parts_are_named_from_any_of_them() {
        let split = Split::of("big-model-00002-of-00003.gguf", &metadata(1, 3)).unwrap().unwrap();
        assert_eq!((split.parts, split.name(0).as_str()), (3, "big-model-00001-of-00003.gguf"));
        split.check(1, &metadata(1, 3)).unwrap();
        split.check_tensors(&metadata(0, 3), 7).unwrap();
        assert_eq!(Split::of("one.gguf", &BTreeMap::new()).unwrap(), None);
        assert_eq!(Split::of("one.gguf", &metadata(0, 1)).unwrap(), None);
    }

    #[test]
    fn what_does_not_fit_together_says_so() {
        for name in ["big.gguf", "big-00001-of-00004.gguf", "big-0000x-of-00003.gguf", "-of-00003.gguf"] {
            assert!(Split::of(name, &metadata(0, 3)).is_err(), "{name}");
        }
        let split = Split::of("a-00001-of-00003.gguf", &metadata(0, 3)).unwrap().unwrap();
        for (result, said) in [
            (split.check(1, &metadata(2, 3)), "split.no = 2"),
            (split.check(1, &metadata(1, 4)), "split.count = 4"),
            (split.check(1, &BTreeMap::new()), "no number"),
            (split.check_tensors(&metadata(0, 3), 6), "the 3 parts hold 6"),
        ] {
            let text = result.unwrap_err().to_string();
            assert!(text.contains(said), "{text}");
        }
    }
}
