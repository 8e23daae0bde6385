//! Dirty pages on the wire: encoded by several threads against what was sent last, checked before they are applied.
//!
//! A page travels as the cheapest of: nothing (unchanged since it was sent last), zero, the words that changed, the
//! XOR with the last sent version compressed, the page compressed, the page itself. What was sent last is kept in a
//! bounded cache on the sender; on the receiver it is the guest's memory itself.
//!
//! Invariant: the cache equals the receiver's memory after everything sent so far is applied. So chunks are applied
//! in the order in which they were sent, and after a lost connection [`PageEncoder::reset`] forgets the cache.

mod cache;
mod codec;
mod encoder;
mod staged;

pub use codec::{Compression, PageKind, PageStats};
pub use encoder::{ChunkSink, CopiedPages, EncodeError, EncoderConfig, LivePages, PageEncoder, PageSource, SinkClosed};
pub use staged::{PageChunk, PagesError};

/// Bytes that the encoder aims at for one chunk of pages. A chunk is one frame.
pub const CHUNK_TARGET_BYTES: usize = 256 * 1024;

/// No chunk is longer than this.
pub const CHUNK_MAX_BYTES: usize = CHUNK_TARGET_BYTES + codec::RECORD_MAX_BYTES;

/// Bytes at the start of a chunk: sequence number of the frame in its stream (u32, filled in by whoever sends it),
/// number of records (u32).
pub const CHUNK_HEADER_BYTES: usize = 8;
