//! How a model of the hub is named: `org/name`, `org/name@revision`, `org/name:FILE.gguf`.

use std::fmt;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// `org/name`.
    pub repository: String,
    /// A branch, a tag or a commit.
    pub revision: String,
    /// One `.gguf` file of the repository.
    pub file: Option<String>,
}

impl Reference {
    /// None where the text can't be a name of the hub.
    pub fn parse(text: &str) -> Option<Reference> {
        let (text, file) = match text.split_once(':') {
            Some((text, file)) => (text, Some(file)),
            None => (text, None),
        };
        let (repository, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (owner, name) = repository.split_once('/')?;
        let letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let part = |part: &str| {
            (1..=96).contains(&part.len())
                && part.chars().all(letter)
                && !part.starts_with(['.', '-'])
                && !part.ends_with(".gguf")
        };
        // Folders of a file or a revision must stay inside the cache.
        let inside = |path: &str| {
            let steps = |step: &str| !step.is_empty() && step != "." && step != ".." && !step.contains(['\\', '\0']);
            !path.is_empty() && path.len() <= 512 && path.split('/').all(steps)
        };
        let file_right = file.is_none_or(|file| inside(file) && file.ends_with(".gguf"));
        (part(owner) && part(name) && inside(revision) && file_right).then(|| Reference {
            repository: repository.into(),
            revision: revision.into(),
            file: file.map(str::to_string),
        })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        if self.revision != "main" {
            write!(f, "@{}", self.revision)?;
        }
        match &self.file {
            Some(file) => write!(f, ":{file}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub_are_told_from_paths() {
        let parts = |text: &str| Reference::parse(text).map(|r| (r.repository, r.revision, r.file));
        let reference = |repository: &str, revision: &str, file: Option<&str>| {
            Some((repository.to_string(), revision.to_string(), file.map(str::to_string)))
        };
        assert_eq!(parts("Qwen/Qwen3-0.6B"), reference("Qwen/Qwen3-0.6B", "main", None));
        assert_eq!(parts("a/b@refs/pr/1"), reference("a/b", "refs/pr/1", None));
        assert_eq!(parts("a/b@v1:Q4/m.gguf"), reference("a/b", "v1", Some("Q4/m.gguf")));
        for path in
            ["demo", "./a/b", "/a/b", "a/b/c", "../a", "a/b:x.bin", "a/b:../x.gguf", "a/b@", "a/b@..", "a/m.gguf"]
        {
            assert_eq!(parts(path), None, "{path}");
        }
        for text in ["a/b", "a/b@v1", "a/b@v1:x.gguf"] {
            assert_eq!(Reference::parse(text).unwrap().to_string(), text);
        }
    }
}
