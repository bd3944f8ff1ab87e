//! Who may ask, and how much: a request shows a key, or passes where the API is open. Each key is a tenant of its own: its
//! prompts share cached prefixes with no other's, and what it uses counts against its limits alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{self, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use super::State;
use super::error::ApiError;
use super::keys::{Holder, Keys};
use super::rates::Excess;
use crate::metrics;
use crate::schedule::Turn;

/// Whose request it is; nobody's in particular where the API is open. The request counts as running until all clones are
/// gone.
#[derive(Debug, Clone)]
pub struct Tenant(Option<Arc<Place>>);

/// One of the requests that a key has running.
#[derive(Debug)]
struct Place(Arc<Holder>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.usage().leave();
    }
}

impl Tenant {
    /// One request more of this holder's.
    fn enter(holder: Option<&Arc<Holder>>) -> Result<Tenant, ApiError> {
        let Some(holder) = holder else { return Ok(Tenant(None)) };
        let entered = holder.usage().enter(Instant::now());
        entered.map_err(|excess| limited(holder, excess))?;
        Ok(Tenant(Some(Arc::new(Place(Arc::clone(holder))))))
    }

    /// Counts a prompt of so many tokens, if there is room for it.
    pub fn prompt(&self, tokens: usize) -> Result<(), ApiError> {
        let Some(place) = &self.0 else { return Ok(()) };
        let fits = place.0.usage().prompt(tokens, Instant::now());
        fits.map_err(|excess| limited(&place.0, excess))
    }

    /// The prompt was not computed after all.
    pub fn refund(&self, tokens: usize) {
        if let Some(place) = &self.0 {
            place.0.usage().refund(tokens);
        }
    }

    pub fn generated(&self, tokens: usize) {
        if let Some(place) = &self.0 {
            place.0.usage().generated(tokens);
        }
    }

    /// Its place among those that wait: a key's number, of which the key can't be guessed, and the key's weight.
    pub fn turn(&self, priority: i32) -> Turn {
        let open = Turn { priority, ..Turn::default() };
        let of = |place: &Arc<Place>| Turn { tenant: place.0.number(), weight: place.0.usage().weight(), ..open };
        self.0.as_ref().map_or(open, of)
    }

    /// The salt of this tenant's cache, and of a part of it where the client asks for one.
    pub fn salt(&self, cache_salt: &str) -> u64 {
        let own = self.0.as_ref().map_or(0, |place| place.0.number());
        if cache_salt.is_empty() {
            return own;
        }
        let digest = Sha256::new().chain_update(own.to_le_bytes()).chain_update(cache_salt).finalize();
        u64::from_le_bytes(digest[..8].try_into().expect("eight of 32 bytes"))
    }
}

fn limited(holder: &Holder, excess: Excess) -> ApiError {
    metrics::request_limited(&holder.name, excess.what.label());
    ApiError::Limited(excess)
}

/// Checks the value of an `Authorization` header: who holds the key, or nobody where the API is open.
fn check(keys: &Keys, authorization: Option<&[u8]>) -> Result<Option<Arc<Holder>>, ApiError> {
    if keys.is_open() {
        return Ok(None);
    }
    let Some(value) = authorization else {
        return Err(ApiError::Unauthorized("an API key is needed, as `Authorization: Bearer KEY`"));
    };
    let key = match value.split_at_checked(7) {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => key.trim_ascii(),
        _ => return Err(ApiError::Unauthorized("the API key must be sent as `Authorization: Bearer KEY`")),
    };
    match keys.find(key) {
        Some(holder) => Ok(Some(holder)),
        None => Err(ApiError::Unauthorized("the API key is not known")),
    }
}

/// Lets a request pass that holds a key, or any where the API is open.
pub async fn guard(extract::State(state): extract::State<Arc<State>>, mut request: Request, next: Next) -> Response {
    let authorization = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
    let holder = match check(&state.keys, authorization) {
        Ok(holder) => holder,
        Err(error) => return error.into_response(),
    };
    let mut response = match Tenant::enter(holder.as_ref()) {
        Ok(tenant) => {
            request.extensions_mut().insert(tenant);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    };
    if let Some(holder) = holder {
        tell(&holder, response.headers_mut());
    }
    response
}

/// Tells what is left, as OpenAI's clients know it.
fn tell(holder: &Holder, headers: &mut HeaderMap) {
    let (requests, tokens) = holder.usage().standing(Instant::now());
    for (what, standing) in [("requests", requests), ("tokens", tokens)] {
        let Some(standing) = standing else { continue };
        for (word, value) in [
            ("limit", standing.limit.to_string()),
            ("remaining", standing.left.to_string()),
            ("reset", span(standing.full_in)),
        ] {
            let name = HeaderName::from_bytes(format!("x-ratelimit-{word}-{what}").as_bytes());
            if let (Ok(name), Ok(value)) = (name, HeaderValue::from_str(&value)) {
                headers.insert(name, value);
            }
        }
    }
}

/// A time as OpenAI writes it: `20ms`, `7s`, `6m0s`.
fn span(time: Duration) -> String {
    let (millis, seconds) = (time.as_millis(), time.as_secs_f64().ceil() as u64);
    match seconds {
        _ if millis < 1000 => format!("{millis}ms"),
        0..60 => format!("{seconds}s"),
        _ => format!("{}m{}s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_known_key_passes() {
        let keys = Keys::new(["secret", "other"]);
        for (header, passes) in [
            (Some("Bearer secret"), true),
            (Some("bearer other"), true),
            (Some("Bearer secre"), false),
            (Some("Bearer secret2"), false),
            (Some("Bearer "), false),
            (Some("Basic secret"), false),
            (Some(""), false),
            (None, false),
        ] {
            assert_eq!(check(&keys, header.map(str::as_bytes)).is_ok(), passes, "{header:?}");
        }
        assert!(check(&Keys::new([]), None).is_ok());
    }

    #[test]
    fn tenants_and_their_parts_share_no_cache() {
        let keys = Keys::new(["a", "b"]);
        let tenant = |header: &[u8]| Tenant::enter(check(&keys, Some(header)).unwrap().as_ref()).unwrap();
        let (a, b) = (tenant(b"Bearer a"), tenant(b"Bearer b"));
        let salts = [a.salt(""), b.salt(""), a.salt("x"), b.salt("x"), Tenant(None).salt("")];
        for (index, salt) in salts.iter().enumerate() {
            assert!(!salts[..index].contains(salt), "{salts:?}");
        }
        assert_eq!(a.salt("x"), a.salt("x"));
    }

    #[test]
    fn times_are_written_as_openai_does() {
        for (millis, text) in
            [(0, "0ms"), (20, "20ms"), (1000, "1s"), (6500, "7s"), (59_500, "1m0s"), (360_000, "6m0s")]
        {
            assert_eq!(span(Duration::from_millis(millis)), text);
        }
    }
}
