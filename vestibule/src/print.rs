//! Lines on standard output.

use std::{
    fmt,
    io::{self, ErrorKind, Write},
};

/// Writes a line to standard output. Its reader may have had enough (`| head`); what there is to be
/// done is done all the same.
pub(crate) fn write_line(text: fmt::Arguments<'_>) -> io::Result<()> {
    match writeln!(io::stdout(), "{text}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Like `println!`, for [`write_line`].
macro_rules! say {
    ($($text:tt)*) => { $crate::print::write_line(format_args!($($text)*)) };
}
pub(crate) use say;
