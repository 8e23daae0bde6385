//! Why a command ends without what was asked for; `docs/exit-codes.md` has the codes.

use ftvm_watch::explain;

/// What the program ends with.
mod code {
    pub const OK: u8 = 0;
    pub const INTERNAL: u8 = 1;
    pub const CONFIG: u8 = 10;
    pub const REFUSED: u8 = 26;
    pub const TIMEOUT: u8 = 28;
    pub const API_SERVER: u8 = 31;
    pub const NOT_FOUND: u8 = 32;
}

/// Why a command ends. What the API server says in it is not harmless yet: [`crate::text::plain`].
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// No configuration for the API server.
    #[error("no way to the API server ({0}): set KUBECONFIG, or choose a context of it with --context")]
    Config(String),
    /// The API server's answer, or none.
    #[error("{what}: {why}: look whether `kubectl` can do it, and whether you may")]
    ApiServer {
        /// What was asked.
        what: String,
        /// What came of it.
        why: String,
        /// The same question has the same answer: rights, or a request that is none.
        lasts: bool,
    },
    /// The kind is not known.
    #[error(
        "{what}: the cluster does not know FaultTolerantVMs ({why}): install the chart, or choose another --context"
    )]
    NoKind {
        /// What was asked.
        what: String,
        /// The answer.
        why: String,
    },
    /// There is no such VM.
    #[error(
        "there is no FaultTolerantVM {namespace}/{name}, or the cluster does not know the kind: `kubectl ftvm status --all-namespaces` lists them"
    )]
    NoVm {
        /// Where.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// The VM that was asked something is not there any more.
    #[error("FaultTolerantVM {namespace}/{name} was deleted meanwhile")]
    Gone {
        /// Where.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// Another release's.
    #[error(
        "FaultTolerantVM {namespace}/{name} can't be read by this release ({why}): use the plugin of the operator's release, or `--output yaml`"
    )]
    Unreadable {
        /// Where.
        namespace: String,
        /// Its name.
        name: String,
        /// Which field, and why.
        why: String,
    },
    /// It won't be done.
    #[error("{what}: {why}")]
    Refused {
        /// What was asked for.
        what: String,
        /// Why not, and what to do.
        why: String,
    },
    /// It is not done in time.
    #[error(
        "{what}: asked for, and not done within {seconds} s; last seen: {why}. It stays asked for: `kubectl ftvm status {name} --namespace {namespace}` tells what comes of it"
    )]
    Late {
        /// What was asked for.
        what: String,
        /// Of which VM.
        name: String,
        /// Where.
        namespace: String,
        /// So long was waited.
        seconds: u64,
        /// Last reason why it is not so.
        why: String,
    },
    /// Standard output, a file, or standard input.
    #[error("{what}: {source}")]
    Io {
        /// Which one.
        what: String,
        /// The cause.
        source: std::io::Error,
    },
}

impl Failure {
    /// What the API server made of a question.
    pub fn of(what: &str, error: &kube::Error) -> Failure {
        let what = what.to_owned();
        match error {
            kube::Error::Api(status) if status.code == 404 => Failure::NoKind {
                what,
                why: status.message.trim().to_owned(),
            },
            kube::Error::Api(status) => Failure::ApiServer {
                what,
                why: format!("the API server says: {} (code {})", status.message.trim(), status.code),
                // Not what it could not answer, nor what somebody changed at that moment.
                lasts: (400..500).contains(&status.code) && ![408, 409, 429].contains(&status.code),
            },
            error => Failure::ApiServer {
                what,
                why: format!("the API server gives no answer ({})", explain(error)),
                lasts: false,
            },
        }
    }

    /// Exit code.
    pub fn code(&self) -> u8 {
        match self {
            Failure::Config(_) => code::CONFIG,
            Failure::ApiServer { .. } => code::API_SERVER,
            Failure::NoKind { .. } | Failure::NoVm { .. } | Failure::Gone { .. } => code::NOT_FOUND,
            Failure::Unreadable { .. } | Failure::Refused { .. } => code::REFUSED,
            Failure::Late { .. } => code::TIMEOUT,
            // Who reads has seen enough.
            Failure::Io { source, .. } if source.kind() == std::io::ErrorKind::BrokenPipe => code::OK,
            Failure::Io { .. } => code::INTERNAL,
        }
    }

    /// Would the same question have another answer in a moment?
    pub fn may_pass(&self) -> bool {
        matches!(self, Failure::ApiServer { lasts: false, .. })
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    fn answer(code: u16) -> Failure {
        let status = Status::failure("not so", "Reason").with_code(code);
        Failure::of("list", &kube::Error::Api(Box::new(status)))
    }

    #[test]
    fn answers_that_last_are_told_from_those_that_pass() {
        for (code, exit, passes) in [
            (401, 31, false),
            (403, 31, false),
            (422, 31, false),
            (404, 32, false),
            (409, 31, true),
            (429, 31, true),
            (500, 31, true),
            (503, 31, true),
        ] {
            let failure = answer(code);
            assert_eq!((failure.code(), failure.may_pass()), (exit, passes), "{failure}");
            assert!(failure.to_string().contains("not so"), "{failure}");
        }
        let none = Failure::of("list", &kube::Error::LinesCodecMaxLineLengthExceeded);
        assert!(none.may_pass() && none.code() == 31, "{none}");
    }

    #[test]
    fn who_stops_reading_is_no_failure() {
        let io = |kind| Failure::Io {
            what: "standard output".to_owned(),
            source: std::io::Error::from(kind),
        };
        assert_eq!(io(std::io::ErrorKind::BrokenPipe).code(), 0);
        assert_eq!(io(std::io::ErrorKind::StorageFull).code(), 1);
    }
}
