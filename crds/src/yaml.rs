//! The one place that knows how YAML is read and written.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A text that is no YAML of the expected form.
#[derive(Debug, thiserror::Error)]
#[error("YAML: {0}")]
pub struct YamlError(#[from] serde_yaml::Error);

/// Text of a value.
///
/// # Errors
/// If it has keys that are not text.
pub fn write<T: Serialize>(value: &T) -> Result<String, YamlError> {
    Ok(serde_yaml::to_string(value)?)
}

/// A value out of a text.
///
/// # Errors
/// Where and why it does not fit.
pub fn read<T: DeserializeOwned>(text: &str) -> Result<T, YamlError> {
    Ok(serde_yaml::from_str(text)?)
}
