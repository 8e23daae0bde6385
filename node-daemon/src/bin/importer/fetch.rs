//! `importer fetch`: one HTTP request, for what is missing.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use ftvm_node_daemon::disks::Fetch;
use ftvm_node_daemon::disks::frame::Frame;
use ureq::http::{Response, StatusCode};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use crate::Failure;

/// For a connection, and for the head of an answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Without a byte for so long the connection counts as dead.
const SILENCE: Duration = Duration::from_secs(60);
/// Redirections that are followed.
const REDIRECTS_MAX: u32 = 5;
/// Bytes of a frame.
const PIECE_BYTES: usize = 64 << 10;

/// Does it.
pub fn run(order: &str, out: &mut impl Write) -> Result<(), Failure> {
    let order: Fetch =
        serde_json::from_str(order).map_err(|error| Failure::new(format!("its order is malformed: {error}")))?;
    let agent = agent(&order)?;
    let mut request = agent.get(&order.url).header("accept-encoding", "identity");
    if order.from_bytes > 0 {
        request = request.header("range", format!("bytes={}-", order.from_bytes));
        // A weak one does not promise the same bytes (RFC 9110, section 13.1.5).
        if let Some(etag) = order.etag.as_deref().filter(|etag| etag.starts_with('"')) {
            request = request.header("if-range", etag);
        }
    }
    let response = request.call().map_err(|error| {
        Failure::new(format!(
            "the server can't be reached ({error}): check the address and the network"
        ))
    })?;
    let Some((offset, total_bytes)) = part(&response, order.from_bytes)? else {
        return Ok(());
    };
    if total_bytes.is_some_and(|total| total > order.limit_bytes) {
        let total = total_bytes.unwrap_or_default();
        let limit = order.limit_bytes;
        return Err(Failure::new(format!(
            "it has {total} bytes, and a disk of this size takes a download of at most {limit}: make the disk larger"
        )));
    }
    let etag = response.headers().get("etag").map(|tag| tag.as_bytes().to_vec());
    Frame::Begins {
        offset,
        total_bytes: total_bytes.unwrap_or(0),
        etag: &etag.unwrap_or_default(),
    }
    .write(out)?;
    body(response, offset, order.limit_bytes, out)
}

fn agent(order: &Fetch) -> Result<Agent, Failure> {
    let roots = match &order.authority {
        None => RootCerts::WebPki,
        Some(pem) => {
            let certificates: Vec<Certificate<'static>> = parse_pem(pem.as_bytes())
                .filter_map(|item| match item {
                    Ok(PemItem::Certificate(certificate)) => Some(certificate),
                    _ => None,
                })
                .collect();
            if certificates.is_empty() {
                return Err(Failure::new("source.http.authority has no certificate (PEM)"));
            }
            RootCerts::Specific(Arc::new(certificates))
        }
    };
    let tls = TlsConfig::builder().root_certs(roots).build();
    let config = Agent::config_builder()
        .tls_config(tls)
        // What was asked for encrypted is never got in the clear.
        .https_only(order.url.starts_with("https:"))
        .proxy(None)
        .http_status_as_error(false)
        .max_redirects(REDIRECTS_MAX)
        .timeout_resolve(Some(PATIENCE))
        .timeout_connect(Some(PATIENCE))
        .timeout_recv_response(Some(PATIENCE))
        .timeout_per_read(Some(SILENCE))
        .user_agent("fault-tolerant-vm")
        .build();
    Ok(config.into())
}

/// Where the body begins and how long the whole is; none: there is nothing left.
fn part(response: &Response<Body>, from: u64) -> Result<Option<(u64, Option<u64>)>, Failure> {
    let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
    match response.status() {
        StatusCode::OK => {
            let length = header("content-length").and_then(|length| length.parse().ok());
            Ok(Some((0, length)))
        }
        StatusCode::PARTIAL_CONTENT => {
            let range = header("content-range").and_then(content_range);
            match range {
                Some((first, total)) if first == from => Ok(Some((first, total))),
                _ => Err(Failure::new("the server sends another part than was asked for")),
            }
        }
        StatusCode::RANGE_NOT_SATISFIABLE if from > 0 => {
            let total = header("content-range").and_then(|text| text.strip_prefix("bytes */")?.parse().ok());
            if total == Some(from) {
                return Ok(None);
            }
            Err(Failure::new(
                "the file at the server is shorter than it was: it was replaced meanwhile",
            ))
        }
        status => Err(Failure::new(format!(
            "the server says {status}: check the address and who may read it"
        ))),
    }
}

/// `bytes FIRST-LAST/TOTAL` (RFC 9110, section 14.4).
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let first = range.split_once('-')?.0.parse().ok()?;
    Some((first, total.parse().ok()))
}

fn body(response: Response<Body>, offset: u64, limit: u64, out: &mut impl Write) -> Result<(), Failure> {
    let mut reader = response.into_body().into_reader();
    let mut buffer = vec![0u8; PIECE_BYTES];
    let mut at = offset;
    loop {
        let count = match reader.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Failure::new(format!("the download was cut at byte {at}: {error}"))),
        };
        if at + count as u64 > limit {
            return Err(Failure::new(
                "the server sends more than such a disk can take: make the disk larger",
            ));
        }
        Frame::Data {
            offset: at,
            bytes: &buffer[..count],
        }
        .write(out)?;
        out.flush()?;
        at += count as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::content_range;

    #[test]
    fn ranges_are_read_as_specified() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, None)));
        for text in ["", "bytes", "bytes 5/10", "items 5-9/10", "bytes -9/10", "bytes x-9/10"] {
            assert_eq!(content_range(text), None, "{text}");
        }
    }
}
