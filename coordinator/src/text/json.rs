//! Template values as JSON, written as Python's `json.dumps` writes it: models were trained on prompts with its separators,
//! its floats and its escapes, and another form of the same data is another prompt.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// The arguments of `json.dumps` that chat templates use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Style {
    pub ensure_ascii: bool,
    /// What one level is indented by; without it everything stands on one line.
    pub indent: Option<String>,
    pub item_separator: String,
    pub key_separator: String,
    pub sort_keys: bool,
}

impl Style {
    /// Python's defaults for an indentation: `", "` between items of one line, `","` at the end of a line.
    pub fn new(indent: Option<String>) -> Style {
        let item_separator = if indent.is_some() { "," } else { ", " };
        Style {
            ensure_ascii: false,
            indent,
            item_separator: item_separator.into(),
            key_separator: ": ".into(),
            sort_keys: false,
        }
    }
}

/// Nesting beyond this is refused; Python's own limit is near 1000, a server's stack is smaller.
const DEPTH_MAX: usize = 128;

/// Writes a value. Undefined and other values without a JSON form are errors, as in Python.
pub fn dumps(value: &Value, style: &Style) -> Result<String, Error> {
    let mut out = String::new();
    write(value, style, 0, &mut out)?;
    Ok(out)
}

fn write(value: &Value, style: &Style, depth: usize, out: &mut String) -> Result<(), Error> {
    if depth > DEPTH_MAX {
        return Err(refused(format!("JSON nested deeper than {DEPTH_MAX}")));
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => string(value.as_str().unwrap_or_default(), style, out),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?;
            block(['[', ']'], items.len(), style, depth, out, |index, out| {
                write(&items[index], style, depth + 1, out)
            })?;
        }
        ValueKind::Map => {
            let mut entries = Vec::new();
            for key in value.try_iter()?.checked() {
                let key = key?;
                let item = value.get_item(&key)?;
                entries.push((key_text(&key)?, item));
            }
            if style.sort_keys {
                entries.sort_by(|one, other| one.0.cmp(&other.0));
            }
            block(['{', '}'], entries.len(), style, depth, out, |index, out| {
                string(&entries[index].0, style, out);
                out.push_str(&style.key_separator);
                write(&entries[index].1, style, depth + 1, out)
            })?;
        }
        kind => return Err(refused(format!("a value of type {kind} is not JSON serializable"))),
    }
    Ok(())
}

/// Writes a bracketed list of items with separators and, where asked, lines.
fn block(
    brackets: [char; 2],
    count: usize,
    style: &Style,
    depth: usize,
    out: &mut String,
    mut item: impl FnMut(usize, &mut String) -> Result<(), Error>,
) -> Result<(), Error> {
    let line = |depth: usize, out: &mut String| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    };
    out.push(brackets[0]);
    for index in 0..count {
        if index > 0 {
            out.push_str(&style.item_separator);
        }
        line(depth + 1, out);
        item(index, out)?;
    }
    if count > 0 {
        line(depth, out);
    }
    out.push(brackets[1]);
    Ok(())
}

fn refused(why: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, why)
}

fn key_text(key: &Value) -> Result<String, Error> {
    Ok(match key.kind() {
        ValueKind::String => key.as_str().unwrap_or_default().to_string(),
        ValueKind::None => "null".into(),
        ValueKind::Bool => if key.is_true() { "true" } else { "false" }.into(),
        ValueKind::Number => number(key),
        kind => return Err(refused(format!("a key of type {kind} is not JSON serializable"))),
    })
}

/// Python's `repr` of a number: shortest digits, an exponent from 1e16 up and below 1e-4.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(float) = f64::try_from(value.clone()) else { return value.to_string() };
    if float.is_nan() {
        return "NaN".into();
    }
    if float.is_infinite() {
        return if float > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let size = float.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{float:e}");
        let (digits, exponent) = text.split_once('e').expect("the format writes an exponent");
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(exponent) => ('-', exponent),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    format!("{float:?}")
}

fn string(text: &str, style: &Style, out: &mut String) {
    out.push('"');
    for letter in text.chars() {
        match letter {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\0'..='\u{1f}' => out.push_str(&format!("\\u{:04x}", u32::from(letter))),
            // Python writes DEL as it is unless it must be ASCII-clean, where it still does: it is ASCII.
            letter if style.ensure_ascii && !letter.is_ascii() => {
                for unit in letter.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            letter => out.push(letter),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::value::Serde;
    use serde_json::json;

    fn check(value: serde_json::Value, style: &Style, expected: &str) {
        assert_eq!(dumps(&Value::from(Serde(&value)), style).unwrap(), expected);
    }

    #[test]
    fn separators_escapes_and_order_are_pythons() {
        let plain = Style::new(None);
        check(json!({"b": [1, true, null], "a": {}}), &plain, r#"{"b": [1, true, null], "a": {}}"#);
        check(json!("<a href='x'>&\"\\\n\u{1}é😀\u{7f}"), &plain, "\"<a href='x'>&\\\"\\\\\\n\\u0001é😀\u{7f}\"");
        let sorted = Style { sort_keys: true, ..plain.clone() };
        check(json!({"b": 1, "a": 2}), &sorted, r#"{"a": 2, "b": 1}"#);
        let ascii = Style { ensure_ascii: true, ..plain };
        check(json!("é😀"), &ascii, r#""\u00e9\ud83d\ude00""#);
    }

    #[test]
    fn indentation_is_pythons() {
        let style = Style::new(Some("  ".into()));
        check(json!({"a": [1, {}], "b": []}), &style, "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": []\n}");
    }

    #[test]
    fn numbers_are_written_as_python_writes_them() {
        let plain = Style::new(None);
        let check = |value: f64, expected: &str| check(json!(value), &plain, expected);
        check(1.0, "1.0");
        check(0.1, "0.1");
        check(-0.0, "-0.0");
        check(1e16, "1e+16");
        check(123456789012345680.0, "1.2345678901234568e+17");
        check(9007199254740992.0, "9007199254740992.0");
        check(0.0001, "0.0001");
        check(0.00001, "1e-05");
        check(1.5e-300, "1.5e-300");
        super::tests::check(json!(18446744073709551615u64), &plain, "18446744073709551615");
    }

    #[test]
    fn what_has_no_json_form_is_an_error() {
        assert!(dumps(&Value::UNDEFINED, &Style::new(None)).is_err());
        let mut deep = Value::from(1);
        for _ in 0..DEPTH_MAX + 1 {
            deep = Value::from(vec![deep]);
        }
        assert!(dumps(&deep, &Style::new(None)).is_err());
    }
}
