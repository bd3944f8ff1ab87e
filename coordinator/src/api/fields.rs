//! A request's JSON object, read field by field, so that every complaint names its field and its numbers. What a
//! field means is `request.rs`'s business.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};
use tokio::sync::OwnedSemaphorePermit;

use super::error::ApiError;

/// The fields that were not read yet.
#[derive(Debug)]
pub struct Fields {
    map: Map<String, Value>,
    /// Length of the body that they were read from.
    pub bytes: usize,
    /// A long body's place among those held at once, kept as long as what was read of it.
    pub turn: Option<OwnedSemaphorePermit>,
}

impl Fields {
    /// Parses a body of at most `values_max` values. Nesting is bounded by `serde_json` (128 levels); numbers that no
    /// f64 holds are errors.
    pub fn parse(body: &[u8], values_max: usize) -> Result<Fields, ApiError> {
        let bad = |message: String| ApiError::Invalid { param: None, message };
        if let Err(error) = std::str::from_utf8(body) {
            return Err(bad(format!("the body is not UTF-8: a bad byte at {}", error.valid_up_to())));
        }
        let values = values(body);
        if values > values_max {
            return Err(bad(format!("the body holds {values} JSON values, at most {values_max} are allowed")));
        }
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Fields { map, bytes: body.len(), turn: None }),
            Ok(other) => Err(bad(format!("the body must be a JSON object, got {}", kind(&other)))),
            Err(error) => Err(bad(format!("the body is not valid JSON: {error}"))),
        }
    }

    /// Takes a field; `null` is the same as none.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// Whether a field is there, and is not `null`.
    pub fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|value| !value.is_null())
    }

    /// A finite number within `range`.
    pub fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        self.take(name).map(|value| number(name, &value, range)).transpose()
    }

    /// A whole number within `range`; `5.0` is one.
    pub fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        self.take(name).map(|value| integer(name, &value, range)).transpose()
    }

    pub fn flag(&mut self, name: &str, default: bool) -> Result<bool, ApiError> {
        match self.take(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(other) => Err(wrong(name, "true or false", &other)),
        }
    }

    pub fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(name, "a string", &other)),
        }
    }

    pub fn array(&mut self, name: &str, length_max: usize) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(items)) => {
                check_length(name, items.len(), length_max)?;
                Ok(Some(items))
            }
            Some(other) => Err(wrong(name, "an array", &other)),
        }
    }

    pub fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(wrong(name, "an object", &other)),
        }
    }

    /// Token ids, each below `vocabulary`.
    pub fn tokens(&mut self, name: &str, length_max: usize, vocabulary: usize) -> Result<Option<Vec<u32>>, ApiError> {
        let Some(items) = self.array(name, length_max)? else { return Ok(None) };
        items.iter().map(|item| token(name, item, vocabulary)).collect::<Result<_, _>>().map(Some)
    }
}

/// How many values a JSON text holds, members' names among them, without building any: commas, colons and openings
/// outside strings.
fn values(body: &[u8]) -> usize {
    let (mut count, mut quoted, mut escaped) = (1, false, false);
    for &byte in body {
        if quoted {
            quoted = escaped || byte != b'"';
            escaped = !escaped && byte == b'\\';
        } else {
            quoted = byte == b'"';
            count += usize::from(matches!(byte, b',' | b':' | b'[' | b'{'));
        }
    }
    count
}

pub fn check_length(name: &str, length: usize, length_max: usize) -> Result<(), ApiError> {
    if length > length_max {
        return Err(ApiError::invalid(name, format!("`{name}` may hold {length_max} items, got {length}")));
    }
    Ok(())
}

/// A token id that the model knows.
pub fn token(name: &str, value: &Value, vocabulary: usize) -> Result<u32, ApiError> {
    match value.as_u64() {
        Some(id) if (id as usize) < vocabulary => Ok(id as u32),
        Some(id) => {
            let message = format!("`{name}`: token id {id} is not in the vocabulary of {vocabulary} tokens");
            Err(ApiError::invalid(name, message))
        }
        None => Err(wrong(name, &format!("token ids from 0 to {}", vocabulary.saturating_sub(1)), value)),
    }
}

pub fn number(name: &str, value: &Value, range: RangeInclusive<f64>) -> Result<f64, ApiError> {
    let (least, most) = (*range.start(), *range.end());
    match value.as_f64() {
        // Written so that a NaN, which is in no range, is refused.
        Some(number) if range.contains(&number) => Ok(number),
        Some(number) => {
            Err(ApiError::invalid(name, format!("`{name}` must be between {least} and {most}, got {number}")))
        }
        None => Err(wrong(name, &format!("a number between {least} and {most}"), value)),
    }
}

pub fn integer(name: &str, value: &Value, range: RangeInclusive<i64>) -> Result<i64, ApiError> {
    let (least, most) = (*range.start(), *range.end());
    let expected = format!("a whole number between {least} and {most}");
    let whole = |number: f64| (number.fract() == 0.0 && number.abs() < 9e15).then_some(number as i64);
    match value {
        Value::Number(given) => match given.as_i64().or_else(|| given.as_f64().and_then(whole)) {
            Some(number) if range.contains(&number) => Ok(number),
            _ => Err(ApiError::invalid(name, format!("`{name}` must be {expected}, got {given}"))),
        },
        other => Err(wrong(name, &expected, other)),
    }
}

/// A value of the wrong type. The value itself is not repeated where it could be long.
pub fn wrong(name: &str, expected: &str, got: &Value) -> ApiError {
    let got = match got {
        Value::Number(number) => number.to_string(),
        Value::String(text) if text.chars().count() <= 40 => format!("the string {text:?}"),
        other => kind(other).to_string(),
    };
    ApiError::invalid(name, format!("`{name}` must be {expected}, got {got}"))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str) -> Fields {
        Fields::parse(text.as_bytes(), 100).unwrap()
    }

    #[test]
    fn a_whole_number_may_be_written_as_a_float_and_null_is_absent() {
        assert_eq!(fields(r#"{"n": 5.0}"#).integer("n", 0..=9).unwrap(), Some(5));
        assert_eq!(fields(r#"{"n": null}"#).integer("n", 0..=9).unwrap(), None);
        assert_eq!(fields(r#"{"n": -9223372036854775808}"#).integer("n", i64::MIN..=i64::MAX).unwrap(), Some(i64::MIN));
    }

    #[test]
    fn numbers_out_of_range_are_named_with_their_range() {
        for (body, got) in [
            (r#"{"n": 5.5}"#, "5.5"),
            (r#"{"n": 1e300}"#, "1e+300"),
            (r#"{"n": 18446744073709551616}"#, "1.8446744073709552e+19"),
            (r#"{"n": -1}"#, "-1"),
            (r#"{"n": "7"}"#, "the string \"7\""),
            (r#"{"n": [1]}"#, "an array"),
        ] {
            let message = fields(body).integer("n", 0..=9).unwrap_err().to_string();
            assert!(message.starts_with("`n` must be a whole number between 0 and 9, got "), "{message}");
            assert!(message.ends_with(got), "{message}");
        }
        let message = fields(r#"{"t": 1e300}"#).number("t", 0.0..=2.0).unwrap_err().to_string();
        assert!(message.starts_with("`t` must be between 0 and 2, got 1"), "{message}");
    }

    #[test]
    fn values_are_counted_before_they_cost_memory() {
        for (body, count) in [(r#"{"a":[1,2]}"#, 5), (r#"{"a":"[[[,,,::: \\\" ,"}"#, 3), (r#"{"a":"\\\\","b":1}"#, 5)] {
            assert_eq!(values(body.as_bytes()), count, "{body}");
            assert!(Fields::parse(body.as_bytes(), count).is_ok(), "{body}");
            let message = Fields::parse(body.as_bytes(), count - 1).unwrap_err().to_string();
            assert!(message.contains(&format!("holds {count} JSON values, at most {}", count - 1)), "{message}");
        }
    }

    #[test]
    fn a_body_that_is_no_object_is_refused() {
        let deep = "[".repeat(200);
        for body in ["", "[]", "3", "{", r#"{"a": NaN}"#, r#"{"a": 1e999}"#, "{\"a\": \"\\ud800\"}", &deep] {
            assert!(Fields::parse(body.as_bytes(), 1000).is_err(), "{body}");
        }
        assert!(Fields::parse(b"{\"a\": \"\xff\"}", 100).unwrap_err().to_string().contains("not UTF-8"));
    }
}
