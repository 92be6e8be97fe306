//! Console device with one port (virtio 1.2, "Console Device", without `VIRTIO_CONSOLE_F_MULTIPORT`).

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use arch::mem::SharedMem;

use super::device::{Activation, Running, VirtioDevice};
use super::queue::{Chain, QueueBroken, VirtQueue};
use super::serve::{copy_fields, serve};
use crate::console::Console;

const F_SIZE: u64 = 1;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Most bytes taken from one transmit buffer, a multiple of what drivers send; the rest of it is dropped.
const TRANSMIT_BYTES: usize = 64 << 10;
/// Buffers per queue and wake-up.
const BUFFERS: usize = 16;
const PIECE: usize = 4096;

/// The virtio side of a [`Console`]. While its driver is up, input comes here and not to the 16550.
#[derive(Debug)]
pub struct VirtioConsole {
    console: Console,
}

impl VirtioConsole {
    /// A device without a driver.
    pub fn new(console: Console) -> Self {
        Self { console }
    }
}

impl VirtioDevice for VirtioConsole {
    fn id(&self) -> u32 {
        3
    }

    fn features(&self) -> u64 {
        self.console.size().map_or(0, |_| F_SIZE)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }

    /// `struct virtio_console_config`: columns, rows; the fields of other features are zero.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = self.console.size().unwrap_or_default();
        let ([a, b], [c, d]) = (columns.to_le_bytes(), rows.to_le_bytes());
        copy_fields(&[a, b, c, d], offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Readable when there is input, or when the running device has more to do.
    fn backend(&self) -> Option<BorrowedFd<'_>> {
        Some(self.console.input_ready().as_fd())
    }

    fn activate(&mut self, with: Activation) -> io::Result<Box<dyn Running>> {
        let mut queues = with.queues.into_iter();
        let running = RunningConsole {
            mem: with.mem,
            receive: queues.next().flatten(),
            transmit: queues.next().flatten(),
            console: self.console.clone(),
        };
        self.console.attach_port(true);
        Ok(Box::new(running))
    }
}

struct RunningConsole {
    mem: SharedMem,
    receive: Option<VirtQueue>,
    transmit: Option<VirtQueue>,
    console: Console,
}

impl Drop for RunningConsole {
    fn drop(&mut self) {
        self.console.attach_port(false);
    }
}

impl RunningConsole {
    /// Output. The host's side never waits, so the guest's buffers come back at once.
    fn transmit(&mut self) -> Result<(), QueueBroken> {
        let Some(queue) = &mut self.transmit else {
            return Ok(());
        };
        let handle = |chain: &Chain| {
            put(chain, &self.mem, &self.console);
            Ok(0)
        };
        let more = serve(queue, &self.mem, BUFFERS, handle)?;
        self.console.flush();
        if more {
            self.console.input_ready().signal();
        }
        Ok(())
    }

    /// Input. Without buffers it stays with the console, which holds back the sender.
    fn receive(&mut self) -> Result<(), QueueBroken> {
        let Some(queue) = &mut self.receive else {
            return Ok(());
        };
        let mut left = BUFFERS;
        while self.console.has_input() {
            if left == 0 {
                self.console.input_ready().signal();
                break;
            }
            let Some(chain) = queue.pop(&self.mem)? else {
                if queue.enable_kicks(&self.mem)? {
                    continue;
                }
                break;
            };
            left = left.saturating_sub(1);
            if chain.writable().is_empty() {
                return Err(chain.bad_shape(queue.index()));
            }
            let written = fill(&chain, &self.mem, &self.console);
            queue.push(&self.mem, chain.head(), written)?;
        }
        queue.notify(&self.mem)
    }
}

impl Running for RunningConsole {
    fn on_kick(&mut self, queue: usize) -> Result<(), QueueBroken> {
        match queue {
            RECEIVE => self.receive(),
            TRANSMIT => self.transmit(),
            _ => Ok(()),
        }
    }

    fn on_backend(&mut self) -> Result<(), QueueBroken> {
        self.console.input_ready().clear();
        self.receive()?;
        self.transmit()
    }
}

/// Prints one buffer. Memory that turned private ends it early.
fn put(chain: &Chain, mem: &SharedMem, console: &Console) {
    let mut reader = chain.reader(mem).take(TRANSMIT_BYTES as u64);
    let mut buf = [0; PIECE];
    while let Ok(count) = reader.read(&mut buf)
        && count != 0
    {
        console.put(buf.get(..count).unwrap_or_default());
    }
}

/// Fills one buffer with the input there is.
fn fill(chain: &Chain, mem: &SharedMem, console: &Console) -> u32 {
    let mut writer = chain.writer(mem);
    let mut buf = [0; PIECE];
    while writer.left() != 0 {
        let room = usize::try_from(writer.left()).unwrap_or(PIECE).min(PIECE);
        let count = console.take_for_port(buf.get_mut(..room).unwrap_or_default());
        let piece = buf.get(..count).unwrap_or_default();
        if piece.is_empty() || writer.write_all(piece).is_err() {
            break;
        }
    }
    u32::try_from(writer.moved()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
