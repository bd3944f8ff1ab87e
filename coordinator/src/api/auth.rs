//! Who may ask: API keys, kept as digests and compared in constant time. Each key is a tenant of its own: its prompts
//! share cached prefixes with no other's.

use std::hint::black_box;
use std::sync::Arc;

use axum::extract::{self, Request};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use super::State;
use super::error::ApiError;

/// The keys that are accepted; none means that everyone may ask.
#[derive(Clone, Default)]
pub struct Keys {
    digests: Vec<[u8; 32]>,
}

/// Whose request it is, for the prefix cache; 0 where there are no keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tenant(u64);

impl Tenant {
    /// The salt of this tenant's cache, and of a part of it where the client asks for one.
    pub fn salt(self, cache_salt: &str) -> u64 {
        if cache_salt.is_empty() {
            return self.0;
        }
        let digest = Sha256::new().chain_update(self.0.to_le_bytes()).chain_update(cache_salt).finalize();
        head(&digest.into())
    }
}

impl Keys {
    pub fn new<'k>(keys: impl IntoIterator<Item = &'k str>) -> Keys {
        Keys { digests: keys.into_iter().map(|key| Sha256::digest(key).into()).collect() }
    }

    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// Checks the value of an `Authorization` header. Takes the same time whichever key comes close.
    fn check(&self, authorization: Option<&[u8]>) -> Result<Tenant, ApiError> {
        if self.is_empty() {
            return Ok(Tenant(0));
        }
        let Some(value) = authorization else {
            return Err(ApiError::Unauthorized("an API key is needed, as `Authorization: Bearer KEY`"));
        };
        let key = match value.split_at_checked(7) {
            Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => key.trim_ascii(),
            _ => return Err(ApiError::Unauthorized("the API key must be sent as `Authorization: Bearer KEY`")),
        };
        let digest: [u8; 32] = Sha256::digest(key).into();
        let known = self.digests.iter().fold(false, |known, expected| known | same(expected, &digest));
        if known { Ok(Tenant(head(&digest))) } else { Err(ApiError::Unauthorized("the API key is not known")) }
    }
}

fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    black_box(a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b))) == 0
}

fn head(digest: &[u8; 32]) -> u64 {
    u64::from_le_bytes(digest[..8].try_into().expect("eight of 32 bytes"))
}

/// Lets a request pass that holds a key, or any where there are none.
pub async fn guard(extract::State(state): extract::State<Arc<State>>, mut request: Request, next: Next) -> Response {
    let authorization = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
    match state.keys.check(authorization) {
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
            assert_eq!(keys.check(header.map(str::as_bytes)).is_ok(), passes, "{header:?}");
        }
        assert!(Keys::default().check(None).is_ok());
    }

    #[test]
    fn tenants_and_their_parts_share_no_cache() {
        let keys = Keys::new(["a", "b"]);
        let (a, b) = (keys.check(Some(b"Bearer a")).unwrap(), keys.check(Some(b"Bearer b")).unwrap());
        let salts = [a.salt(""), b.salt(""), a.salt("x"), b.salt("x"), Tenant(0).salt("")];
        for (i, salt) in salts.iter().enumerate() {
            assert!(!salts[..i].contains(salt));
        }
        assert_eq!(a.salt("x"), a.salt("x"));
    }
}
