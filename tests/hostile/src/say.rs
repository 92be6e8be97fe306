//! The serial port, to which every line of the report goes.

use core::fmt;

use crate::machine::out;

/// The first serial port.
pub(crate) const PORT: u16 = 0x3f8;

/// Writes to the serial port.
pub(crate) struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            out(PORT, byte);
        }
        Ok(())
    }
}

/// Prints a line.
macro_rules! say {
    ($($words:tt)*) => {{
        use core::fmt::Write as _;
        let _ = writeln!($crate::say::Serial, $($words)*);
    }};
}
pub(crate) use say;
