//! Which bridges of this node guests may be connected to.
//!
//! Invariant: a tap is put on a bridge by an [`Admitted`] name alone, and only an [`AllowedBridges`] gives those: whatever a
//! virtual machine, its pod or a remembered seat names is looked at when the tap is made.

use std::fmt;
use std::str::FromStr;

/// Longest name of a network device (`IFNAMSIZ` less the terminating zero): a longer one would be cut, and then be another's.
const NAME_BYTES_MAX: usize = 15;
/// What a message lists.
const LISTED_MAX: usize = 10;

/// A bridge's name, or its beginning followed by `*`; `*` alone is every bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BridgePattern {
    /// This one.
    Exact(String),
    /// All whose names begin so.
    Prefix(String),
}

impl BridgePattern {
    fn matches(&self, name: &str) -> bool {
        match self {
            BridgePattern::Exact(exact) => name == exact,
            BridgePattern::Prefix(prefix) => name.starts_with(prefix.as_str()),
        }
    }
}

impl FromStr for BridgePattern {
    type Err = BridgeError;

    fn from_str(text: &str) -> Result<Self, BridgeError> {
        let refuse = || BridgeError::Pattern(text.to_owned());
        match text.strip_suffix('*') {
            Some(prefix) if prefix.is_empty() || is_name(prefix) => Ok(BridgePattern::Prefix(prefix.to_owned())),
            None if is_name(text) => Ok(BridgePattern::Exact(text.to_owned())),
            _ => Err(refuse()),
        }
    }
}

impl fmt::Display for BridgePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BridgePattern::Exact(exact) => write!(f, "{exact}"),
            BridgePattern::Prefix(prefix) => write!(f, "{prefix}*"),
        }
    }
}

/// Can a network device be called so? As the resource's own rule has it, which a tampered object need not keep.
pub(crate) fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    let first = bytes
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    first
        && text.len() <= NAME_BYTES_MAX
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// Why a guest is not connected to a bridge, or a pattern is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BridgeError {
    /// It is none of those that are allowed.
    #[error(
        "guests of this node may not be connected to the bridge {bridge} (allowed: {allowed}): name an allowed one in \
         spec.networks[].bridge, or ask whoever installed the chart to add it to its value nodeDaemon.allowedBridges"
    )]
    NotAllowed {
        /// The bridge.
        bridge: String,
        /// Those that are.
        allowed: String,
    },
    /// No device can have this name.
    #[error(
        "`{0}` can't be the name of a bridge: 1 to 15 letters, digits, `_`, `.` and `-`, no `.` or `-` at the beginning"
    )]
    Name(String),
    /// Neither a name nor a beginning.
    #[error(
        "`{0}` names no bridges: write a name, a beginning followed by `*`, or `*` for every bridge; names are up to 15 \
         letters, digits, `_`, `.` and `-`"
    )]
    Pattern(String),
}

/// The bridges that guests may be connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllowedBridges {
    /// Whoever configures the daemon names the bridges, too.
    Any,
    /// What others name must be one of these.
    Listed(Vec<BridgePattern>),
}

impl AllowedBridges {
    /// The bridge of this name, if guests may be connected to it.
    ///
    /// # Errors
    /// Why not, and what to do.
    pub fn admit<'a>(&self, bridge: &'a str) -> Result<Admitted<'a>, BridgeError> {
        if !is_name(bridge) {
            return Err(BridgeError::Name(bridge.chars().take(40).collect()));
        }
        match self {
            AllowedBridges::Listed(patterns) if !patterns.iter().any(|pattern| pattern.matches(bridge)) => {
                Err(BridgeError::NotAllowed {
                    bridge: bridge.to_owned(),
                    allowed: listed(patterns),
                })
            }
            _ => Ok(Admitted(bridge)),
        }
    }
}

fn listed(patterns: &[BridgePattern]) -> String {
    let mut names: Vec<String> = patterns.iter().take(LISTED_MAX).map(ToString::to_string).collect();
    match patterns.len() {
        0 => return "none".to_owned(),
        count if count > LISTED_MAX => names.push(format!("{} more", count - LISTED_MAX)),
        _ => {}
    }
    names.join(", ")
}

/// Name of a bridge that guests may be connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted<'a>(&'a str);

impl<'a> Admitted<'a> {
    /// The name.
    pub fn name(self) -> &'a str {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(patterns: &[&str]) -> AllowedBridges {
        AllowedBridges::Listed(patterns.iter().map(|text| text.parse().unwrap()).collect())
    }

    #[test]
    fn names_beginnings_and_everything() {
        let allowed = list(&["br0", "vm-*"]);
        for bridge in ["br0", "vm-", "vm-front"] {
            assert_eq!(allowed.admit(bridge).map(Admitted::name), Ok(bridge));
        }
        for bridge in ["br", "br00", "br0.1", "VM-front", "vm", "a-vm-front"] {
            assert!(
                matches!(allowed.admit(bridge), Err(BridgeError::NotAllowed { .. })),
                "{bridge}"
            );
        }
        assert!(list(&["*"]).admit("whatever").is_ok());
        assert!(AllowedBridges::Any.admit("whatever").is_ok());
    }

    #[test]
    fn without_a_list_no_bridge_is_allowed_and_the_message_says_what_to_do() {
        let told = list(&[]).admit("br0").unwrap_err().to_string();
        for words in [
            "bridge br0",
            "allowed: none",
            "spec.networks[].bridge",
            "nodeDaemon.allowedBridges",
        ] {
            assert!(told.contains(words), "no {words:?} in {told}");
        }
        let many: Vec<String> = (0..500).map(|number| format!("bridge-{number}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let told = list(&many).admit("br0").unwrap_err().to_string();
        assert!(told.contains("bridge-9, 490 more") && told.len() < 450, "{told}");
    }

    /// The kernel cuts a name at 15 bytes or at a zero: what is compared must be what it sees.
    #[test]
    fn names_that_the_kernel_would_read_otherwise_are_none() {
        let any = list(&["*"]);
        for bridge in [
            "",
            "br0-and-more-than-fits",
            "br0\0-vm",
            "br0/vm",
            "br 0",
            "br0\n",
            ".",
            "..",
            "-br",
            "br%d",
            "br:0",
            "brücke",
        ] {
            assert!(matches!(any.admit(bridge), Err(BridgeError::Name(_))), "{bridge:?}");
            assert!(
                matches!(AllowedBridges::Any.admit(bridge), Err(BridgeError::Name(_))),
                "{bridge:?}"
            );
        }
    }

    #[test]
    fn patterns_that_are_none_are_refused() {
        for text in [
            "",
            "**",
            "*-vm",
            "a*b",
            "br0,br1",
            "a b*",
            "br0-and-more-than-fits",
            "-*",
            " br0",
        ] {
            assert!(text.parse::<BridgePattern>().is_err(), "{text:?}");
        }
        for text in ["br0", "br*", "*", "_a.b-c"] {
            assert_eq!(text.parse::<BridgePattern>().unwrap().to_string(), text);
        }
    }
}
