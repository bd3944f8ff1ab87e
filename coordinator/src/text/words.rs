//! How byte-level BPE vocabularies cut a text into words before merging. A GGUF file only names its family's way;
//! the expressions are those of the families' own tokenizers.

/// One family's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Words {
    /// Applied in order: each cuts the pieces that the one before left, and both matches and gaps become pieces.
    pub patterns: &'static [&'static str],
    /// A whole word that is a token is taken as it is, even where no chain of merges makes it.
    pub whole_words: bool,
    /// Texts begin with the begin token unless the file says otherwise.
    pub adds_begin: bool,
    /// Ids are ranks: a file may leave the merges out.
    pub ranked: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
pub(super) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
pub(super) const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const KIMI: &str = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const BLOOM: &str = r" ?[^(\s|[.,!?…。，、।۔،])]+";
/// Letters with a case, as far as that family's list of them goes.
const DEEPSEEK_LETTERS: &str =
    r"\s?[\p{Lu}\p{Ll}\p{Lt}&&[^\x{10D0}-\x{10FF}\x{10570}-\x{105BF}\x{16E40}-\x{16E7F}\x{1D400}-\x{1D7FF}]]+";
const YOUTU_EAST: &str = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+";
const YOUTU: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const BAILING: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const SEED: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The way of a name in `tokenizer.ggml.pre`; none for a name that is not known, which must not be guessed.
pub fn named(name: &str) -> Option<Words> {
    let plain = |patterns| Some(Words { patterns, whole_words: false, adds_begin: false, ranked: false });
    match name {
        "default" => plain(&[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
        "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "trillion" | "exaone4" | "gigachat" | "a.x-4.0" | "mellum"
        | "granite-docling" => plain(&[GPT2]),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" | "mellum2" => {
            plain(&[r"\p{N}", GPT2])
        }
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0" | "lfm2" => {
            Some(Words { patterns: &[LLAMA3], whole_words: true, adds_begin: true, ranked: false })
        }
        "dbrx" | "smaug-bpe" | "glm4" | "chatglm-bpe" => plain(&[LLAMA3]),
        "qwen2" | "deepseek-r1-qwen" | "kormo" | "megrez" | "stablelm2" | "hunyuan" | "solar-open" | "grok-2" => {
            plain(&[QWEN2])
        }
        "qwen35" => plain(&[QWEN35]),
        "deepseek-v3" | "hunyuan-dense" | "joyai-llm" => plain(&[r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3]),
        "deepseek-coder" => plain(&[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"]),
        "falcon" => plain(&[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"]),
        "tekken" => Some(Words { patterns: &[TEKKEN], whole_words: true, adds_begin: true, ranked: false }),
        "kimi-k2" => Some(Words { patterns: &[KIMI], whole_words: true, adds_begin: false, ranked: true }),
        "bloom" | "gpt3-finnish" | "poro-chat" => plain(&[BLOOM]),
        "viking" => plain(&[BLOOM, r"\p{N}"]),
        "deepseek-llm" => plain(&[
            r"[\r\n]",
            DEEPSEEK_LETTERS,
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            "[一-龥ࠀ-一가-\u{d7ff}]+",
            r"\p{N}+",
        ]),
        "youtu" => Some(Words { patterns: &[YOUTU_EAST, YOUTU], whole_words: true, adds_begin: false, ranked: false }),
        "gpt-4o" | "llama4" | "kanana2" | "minimax-m2" => plain(&[GPT4O]),
        "bailingmoe" | "bailingmoe2" | "llada-moe" => plain(&[BAILING]),
        "seed-coder" => plain(&[SEED]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior};

    fn cut(name: &str, text: &str) -> Vec<String> {
        let mut pieces = PreTokenizedString::from(text);
        for pattern in named(name).unwrap().patterns {
            let split =
                Split::new(SplitPattern::Regex(pattern.to_string()), SplitDelimiterBehavior::Isolated, false).unwrap();
            split.pre_tokenize(&mut pieces).unwrap();
        }
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.iter().map(|(piece, _, _)| piece.to_string()).collect()
    }

    #[test]
    fn each_family_cuts_its_own_way() {
        let check = |name: &str, text: &str, expected: &[&str]| assert_eq!(cut(name, text), expected, "{name}");
        check("gpt-2", "it's 2024 ok  x", &["it", "'s", " 2024", " ok", " ", " x"]);
        check("smollm", "it's 2024", &["it", "'s", " ", "2", "0", "2", "4"]);
        check("llama-bpe", "IT'S 2024!\n\n", &["IT", "'S", " ", "202", "4", "!\n\n"]);
        check("qwen2", "IT'S 24", &["IT", "'S", " ", "2", "4"]);
        check("deepseek-v3", "1234 世界a", &["123", "4", " ", "世界", "a"]);
        check("gpt-4o", "HelloWorld's", &["Hello", "World's"]);
        check("tekken", "HelloWorld 12", &["Hello", "World", " ", "1", "2"]);
        check("kimi-k2", "Hi世界abcIt's 1234 ok", &["Hi", "世界", "abc", "It's", " ", "123", "4", " ok"]);
        check("bloom", "a b, c(d)\n", &["a", " b", ",", " c", "(", "d", ")\n"]);
        check("deepseek-llm", "it 12 世界!  ", &["it", " ", "12", " ", "世界", "!", "  "]);
        check("bailingmoe", "we'LL go!", &["we", "'LL", " go", "!"]);
        check("default", "a$1234", &["a", "$", "123", "4"]);
    }

    #[test]
    fn every_expression_compiles() {
        for name in ["deepseek-coder", "falcon", "youtu", "viking", "qwen35", "seed-coder", "command-r", "dbrx"] {
            assert!(!cut(name, "a b").is_empty(), "{name}");
        }
    }

    /// The engine gives up beyond a million steps back, silently: long runs of one kind must not come near that.
    #[test]
    fn long_runs_are_cut_as_short_ones() {
        for name in ["llama-bpe", "qwen2", "deepseek-v3", "gpt-4o", "tekken", "kimi-k2", "glm4"] {
            for (run, then) in [(" ", "a"), ("\n", "a"), ("a", " b"), ("é", "1"), ("世", "a"), ("!", "a")] {
                let cut = |length: usize| cut(name, &format!("{}{then}", run.repeat(length)));
                let (short, long) = (cut(9), cut(400_000));
                assert_eq!(short.len(), long.len(), "{name} {run:?}");
                let ends = |pieces: &[String]| pieces.last().unwrap().replace(run, "");
                assert_eq!(ends(&short), ends(&long), "{name} {run:?}");
            }
        }
    }

    #[test]
    fn an_unknown_name_is_not_guessed() {
        assert_eq!(named("martian"), None);
    }
}
