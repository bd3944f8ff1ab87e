//! A small HTTP client for our own commands.

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

/// `GET`s JSON.
pub async fn get(url: &str, key: Option<&str>) -> Result<Value> {
    let response = send(request("GET", url, key, Bytes::new())?, url).await?;
    let body = response.into_body().collect().await.context("the answer broke off")?.to_bytes();
    serde_json::from_slice(&body).context("the answer is not JSON")
}

/// `POST`s nothing.
pub async fn post(url: &str, key: Option<&str>) -> Result<()> {
    send(request("POST", url, key, Bytes::new())?, url).await.map(|_| ())
}

/// `POST`s JSON and reads JSON.
pub async fn ask(url: &str, key: Option<&str>, body: &Value) -> Result<Value> {
    let response = send(request("POST", url, key, serde_json::to_vec(body)?.into())?, url).await?;
    let body = response.into_body().collect().await.context("the answer broke off")?.to_bytes();
    serde_json::from_slice(&body).context("the answer is not JSON")
}

/// `POST`s JSON and hands over each event of the answer's stream.
pub async fn stream(url: &str, key: Option<&str>, body: &Value, mut each: impl FnMut(&Value)) -> Result<()> {
    let mut response = send(request("POST", url, key, serde_json::to_vec(body)?.into())?, url).await?.into_body();
    let mut text = Vec::new();
    while let Some(frame) = response.frame().await {
        let Ok(data) = frame.context("the stream broke off")?.into_data() else { continue };
        text.extend_from_slice(&data);
        while let Some(end) = text.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            let Some(data) = line.strip_prefix(b"data: ") else { continue };
            if data.trim_ascii() == b"[DONE]" {
                return Ok(());
            }
            let event: Value = serde_json::from_slice(data).context("an event is not JSON")?;
            if let Some(message) = event["error"]["message"].as_str() {
                bail!("{message}");
            }
            each(&event);
        }
    }
    bail!("the stream ended without [DONE]")
}

fn request(method: &str, url: &str, key: Option<&str>, body: Bytes) -> Result<Request<Full<Bytes>>> {
    let mut request = Request::builder().method(method).uri(url).header("content-type", "application/json");
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    request.body(Full::new(body)).with_context(|| format!("{url} is not an address"))
}

async fn send(request: Request<Full<Bytes>>, url: &str) -> Result<Response<Incoming>> {
    let client = Client::builder(TokioExecutor::new()).build_http();
    let response = client.request(request).await.with_context(|| format!("{url} does not answer"))?;
    let status = response.status();
    if !status.is_success() && status != 503 {
        let body = response.into_body().collect().await.context("the answer broke off")?.to_bytes();
        bail!("{url} answered {status}: {}", String::from_utf8_lossy(&body));
    }
    Ok(response)
}
