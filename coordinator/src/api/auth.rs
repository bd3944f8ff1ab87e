//! Who may ask: a request shows a key, or passes where the API is open. Each key is a tenant of its own: its prompts
//! share cached prefixes with no other's.

use std::sync::Arc;

use axum::extract::{self, Request};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use super::State;
use super::error::ApiError;
use super::keys::{Holder, Keys};

/// Whose request it is; nobody's in particular where the API is open.
#[derive(Debug, Clone)]
pub struct Tenant(Option<Arc<Holder>>);

impl Tenant {
    /// The salt of this tenant's cache, and of a part of it where the client asks for one.
    pub fn salt(&self, cache_salt: &str) -> u64 {
        let own = self.0.as_ref().map_or(0, |holder| holder.number());
        if cache_salt.is_empty() {
            return own;
        }
        let digest = Sha256::new().chain_update(own.to_le_bytes()).chain_update(cache_salt).finalize();
        u64::from_le_bytes(digest[..8].try_into().expect("eight of 32 bytes"))
    }
}

/// Checks the value of an `Authorization` header.
fn check(keys: &Keys, authorization: Option<&[u8]>) -> Result<Tenant, ApiError> {
    if keys.is_open() {
        return Ok(Tenant(None));
    }
    let Some(value) = authorization else {
        return Err(ApiError::Unauthorized("an API key is needed, as `Authorization: Bearer KEY`"));
    };
    let key = match value.split_at_checked(7) {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => key.trim_ascii(),
        _ => return Err(ApiError::Unauthorized("the API key must be sent as `Authorization: Bearer KEY`")),
    };
    match keys.find(key) {
        Some(holder) => Ok(Tenant(Some(holder))),
        None => Err(ApiError::Unauthorized("the API key is not known")),
    }
}

/// Lets a request pass that holds a key, or any where the API is open.
pub async fn guard(extract::State(state): extract::State<Arc<State>>, mut request: Request, next: Next) -> Response {
    let authorization = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
    match check(&state.keys, authorization) {
        Ok(tenant) => {
            request.extensions_mut().insert(tenant);
            next.run(request).await
        }
        Err(error) => error.into_response(),
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
        let (a, b) = (check(&keys, Some(b"Bearer a")).unwrap(), check(&keys, Some(b"Bearer b")).unwrap());
        let salts = [a.salt(""), b.salt(""), a.salt("x"), b.salt("x"), Tenant(None).salt("")];
        for (index, salt) in salts.iter().enumerate() {
            assert!(!salts[..index].contains(salt), "{salts:?}");
        }
        assert_eq!(a.salt("x"), a.salt("x"));
    }
}
