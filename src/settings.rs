//! Settings in TOML, and what is wrong with them: told by line and name, never by what stands there, which may be a secret.

use anyhow::Result;
use serde::de::DeserializeOwned;

/// `what` is said where the text is wrong.
pub fn parse<T: DeserializeOwned>(what: &str, text: &str) -> Result<T> {
    toml::from_str(text).map_err(|error| {
        // The library's own text shows the line.
        let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        let line = line.map_or(String::new(), |line| format!(", line {line}"));
        anyhow::anyhow!("{what} is wrong{line}: {}", without_values(error.message()))
    })
}

/// Leaves out what stands between double quotes: values are quoted so, names of keys are not.
fn without_values(message: &str) -> String {
    let parts: Vec<&str> = message.split('"').collect();
    match parts.as_slice() {
        [first, _, .., last] => format!("{first}\"…\"{last}"),
        _ => message.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use coordinator::config::Config;

    #[test]
    fn errors_name_the_line_and_keep_the_value() {
        for (text, told) in [
            ("model = \"m\"\ntoken = \"hunter2", "line 2"),
            ("model = \"m\"\ntoken = hunter2\n", "line 2"),
            ("model = \"m\"\napi_keys = \"hunter2\"\n", "line 2: invalid type: string \"…\", expected a sequence"),
            ("model = \"m\"\n\napi_keyz = [\"hunter2\"]", "line 3: unknown field `api_keyz`"),
            ("model = \"m\"\ntoken = [\"hunter2\"]", "line 2"),
        ] {
            let error = parse::<Config>("the file", text).expect_err(text).to_string();
            assert!(error.contains(told) && !error.contains("hunter2"), "{text}: {error}");
        }
    }
}
