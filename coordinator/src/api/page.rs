//! The page: a chat and the cluster's state. It loads nothing from elsewhere, and its policy allows nothing else.

use axum::http::header;
use axum::response::IntoResponse;

use super::request::random;

const PAGE: &str = include_str!("page.html");
/// Where the page's own script and style name the nonce.
const NONCE: &str = "{{nonce}}";

pub async fn show() -> impl IntoResponse {
    let nonce = format!("{:016x}{:016x}", random(), random());
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; \
         img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8".to_string()),
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_string()),
        (header::REFERRER_POLICY, "no-referrer".to_string()),
        (header::CACHE_CONTROL, "no-store".to_string()),
    ];
    (headers, PAGE.replace(NONCE, &nonce))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_asks_nobody_else_and_writes_no_html_from_answers() {
        assert_eq!(PAGE.matches(NONCE).count(), 2, "one script, one style");
        for forbidden in ["http:", "https:", "innerHTML", "eval(", " style=", "onclick=", "//cdn"] {
            assert!(!PAGE.contains(forbidden), "{forbidden}");
        }
    }
}
