//! A typed reader of a JSON object that remembers what was read, so that what nobody read can be refused by name.

use crate::bounds::within;
use crate::error::SpecError;
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// The keys of one object of a config. `null` is the same as absence everywhere.
pub(super) struct Keys<'a> {
    /// Goes before a key's name in errors: `rope_scaling.` inside that object.
    prefix: String,
    map: &'a Map<String, Value>,
    read: RefCell<BTreeSet<&'a str>>,
    /// Full names of what [`Keys::absorb`]ed sections left unread.
    unread: RefCell<Vec<String>>,
}

impl<'a> Keys<'a> {
    pub fn new(map: &'a Map<String, Value>) -> Keys<'a> {
        Keys { prefix: String::new(), map, read: RefCell::default(), unread: RefCell::default() }
    }

    /// Whether the key is there, be it null.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The raw value, now read.
    pub fn value(&self, key: &str) -> Option<&'a Value> {
        let (name, value) = self.map.get_key_value(key)?;
        self.read.borrow_mut().insert(name);
        if value.is_null() { None } else { Some(value) }
    }

    /// The object under `key`; hand it to [`Keys::absorb`] when it is read.
    pub fn section(&self, key: &str) -> Result<Option<Keys<'a>>, SpecError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let map = value.as_object().ok_or_else(|| self.bad(key, value, "must be an object"))?;
        Ok(Some(Keys { prefix: format!("{}{key}.", self.prefix), ..Keys::new(map) }))
    }

    /// Takes over what `section` left unread.
    pub fn absorb(&self, section: Keys<'_>) {
        self.unread.borrow_mut().extend(section.left(&|_| false));
    }

    pub fn size(&self, key: &str, max: usize) -> Result<usize, SpecError> {
        self.optional_size(key, max)?.ok_or_else(|| self.missing(key))
    }

    /// A number from 1 to `max`.
    pub fn optional_size(&self, key: &str, max: usize) -> Result<Option<usize>, SpecError> {
        match self.optional_count(key)? {
            Some(n) => within(&self.name(key), n, max).map(Some),
            None => Ok(None),
        }
    }

    /// A whole number from 0.
    pub fn optional_count(&self, key: &str) -> Result<Option<usize>, SpecError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        // Some tools write whole numbers with a decimal point.
        let whole = |f: f64| ((0.0..1e15).contains(&f) && f.fract() == 0.0).then_some(f as u64);
        let number = value.as_u64().or_else(|| value.as_f64().and_then(whole));
        let number = number.and_then(|n| usize::try_from(n).ok());
        number.ok_or_else(|| self.bad(key, value, "must be a whole number, not negative")).map(Some)
    }

    pub fn float(&self, key: &str) -> Result<f64, SpecError> {
        self.optional_float(key)?.ok_or_else(|| self.missing(key))
    }

    pub fn optional_float(&self, key: &str) -> Result<Option<f64>, SpecError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value.as_f64() {
            Some(f) if f.is_finite() => Ok(Some(f)),
            _ => Err(self.bad(key, value, "must be a finite number")),
        }
    }

    pub fn flag(&self, key: &str, default: bool) -> Result<bool, SpecError> {
        Ok(self.optional_flag(key)?.unwrap_or(default))
    }

    pub fn optional_flag(&self, key: &str) -> Result<Option<bool>, SpecError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_bool().ok_or_else(|| self.bad(key, value, "must be true or false")).map(Some)
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>, SpecError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_str().ok_or_else(|| self.bad(key, value, "must be a string")).map(Some)
    }

    /// Whole numbers, or texts, of a list; empty where it is absent.
    pub fn list(&self, key: &str) -> Result<&'a [Value], SpecError> {
        let Some(value) = self.value(key) else { return Ok(&[]) };
        value.as_array().map(Vec::as_slice).ok_or_else(|| self.bad(key, value, "must be a list"))
    }

    /// One token id or a list of them.
    pub fn tokens(&self, key: &str) -> Result<Vec<u32>, SpecError> {
        let Some(value) = self.value(key) else { return Ok(Vec::new()) };
        let one = std::slice::from_ref(value);
        let ids = value.as_array().map_or(one, Vec::as_slice);
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        ids.iter().map(|v| id(v).ok_or_else(|| self.bad(key, value, "must be a token id or a list of them"))).collect()
    }

    /// Refuses any value but `only` (or absence): the rest is not implemented.
    pub fn only<T: Into<Value>>(&self, key: &str, only: T, why: &str) -> Result<(), SpecError> {
        let only = only.into();
        match self.value(key) {
            Some(value) if *value != only => Err(self.bad(key, value, &format!("only {only} is implemented: {why}"))),
            _ => Ok(()),
        }
    }

    /// Refuses every key that was neither read nor is `harmless`.
    pub fn finish(self, harmless: &dyn Fn(&str) -> bool) -> Result<(), SpecError> {
        let unread = self.left(harmless);
        if unread.is_empty() { Ok(()) } else { Err(SpecError::Unread(unread.join(", "))) }
    }

    pub fn bad(&self, key: &str, value: &Value, why: &str) -> SpecError {
        let mut text = value.to_string();
        if text.len() > 200 {
            let end = text.floor_char_boundary(200);
            text.truncate(end);
            text.push_str("...");
        }
        SpecError::bad(self.name(key), text, why)
    }

    pub fn missing(&self, key: &str) -> SpecError {
        SpecError::Missing { key: self.name(key) }
    }

    fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Full names of the keys that were neither read nor are `harmless`.
    pub fn left(&self, harmless: &dyn Fn(&str) -> bool) -> Vec<String> {
        let read = self.read.borrow();
        // A null that nobody reads says nothing.
        let left = self.map.iter().filter(|(k, v)| !v.is_null() && !read.contains(k.as_str()) && !harmless(k));
        left.map(|(k, _)| self.name(k)).chain(self.unread.take()).collect()
    }
}
