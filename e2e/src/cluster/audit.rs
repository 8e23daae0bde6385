//! Who asked the API server for what.
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Deserialize;

/// A request that the API server answered, or (a watch) began to answer.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuditEvent {
    /// `ResponseComplete`, or `ResponseStarted` for watches.
    pub stage: String,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`.
    pub verb: String,
    /// What the client calls itself.
    #[serde(default)]
    pub user_agent: String,
    /// Who it is.
    pub user: AuditUser,
    /// What it is about; none for paths that are no resources.
    pub object_ref: Option<AuditObject>,
    /// When it came: RFC 3339 with microseconds.
    #[serde(default)]
    pub request_received_timestamp: String,
    /// The answer's status.
    pub response_status: Option<AuditStatus>,
}

/// Who asked.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct AuditUser {
    /// The user's name.
    #[serde(default)]
    pub username: String,
}

/// What a request is about.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuditObject {
    /// Plural name of its kind.
    #[serde(default)]
    pub resource: String,
    /// Such as `status`.
    pub subresource: Option<String>,
    /// Its namespace.
    pub namespace: Option<String>,
    /// Its name; a list has none.
    pub name: Option<String>,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct AuditStatus {
    /// HTTP status.
    pub code: Option<u16>,
}

/// The log in a cluster's folder.
pub(super) fn log(folder: &Path) -> PathBuf {
    folder.join("log/audit.log")
}

/// Reads what was written down so far, oldest first.
pub(super) fn read(folder: &Path) -> anyhow::Result<Vec<AuditEvent>> {
    let path = log(folder);
    let text = fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}: is auditing switched on?", path.display()))?;
    // The last line may be half written.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("no audit event: {line}")))
        .collect()
}
