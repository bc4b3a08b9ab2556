//! What the kernel knows of a TCP connection (`TCP_INFO`, tcp(7)). No crate that we use asks for it, so the only `unsafe` code of ours is here, alone.

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd},
    time::Duration,
};

/// What is on its way to the other side, and how long ago either side was heard.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct TcpInfo {
    /// It was reset, or ended on both sides.
    pub is_closed: bool,
    /// Segments that were sent and are not acknowledged.
    pub unacknowledged: u32,
    /// Bytes that were written and have not been sent yet, as where the other side's window is closed. Always 0 before Linux 4.6.
    pub not_sent: u32,
    /// Probes, of a closed window or of keepalive, that were sent since the last acknowledgement.
    pub unanswered_probes: u8,
    /// Since data was sent, for the first time or again. Probes are none.
    pub last_data_sent: Duration,
    /// Since data came.
    pub last_data_received: Duration,
    /// Since an acknowledgement came. The kernel does not count one that comes with data and says nothing new.
    pub last_ack_received: Duration,
}

impl TcpInfo {
    /// Whether the other side has all that was written.
    #[must_use]
    pub fn has_arrived(&self) -> bool {
        self.unacknowledged == 0 && self.not_sent == 0
    }
}

/// `TCP_CLOSE` of `tcp_states.h`.
const CLOSED: u8 = 7;

/// Asks the kernel: one system call.
///
/// # Errors
/// When `socket` is not of TCP.
#[expect(unsafe_code, reason = "getsockopt(2)")]
pub fn tcp_info(socket: impl AsFd) -> io::Result<TcpInfo> {
    // SAFETY: it is made of integers, for which zeroes are values. What an older kernel does not know stays so.
    let mut info: libc::tcp_info = unsafe { mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of_val(&info)).map_err(io::Error::other)?;
    let descriptor = socket.as_fd();
    // SAFETY: the descriptor is open as long as it is borrowed, and the kernel writes at most `length` bytes to `info`.
    let result = unsafe {
        libc::getsockopt(
            descriptor.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let ago = |milliseconds: u32| Duration::from_millis(milliseconds.into());
    Ok(TcpInfo {
        is_closed: info.tcpi_state == CLOSED,
        unacknowledged: info.tcpi_unacked,
        not_sent: info.tcpi_notsent_bytes,
        unanswered_probes: info.tcpi_probes,
        last_data_sent: ago(info.tcpi_last_data_sent),
        last_data_received: ago(info.tcpi_last_data_recv),
        last_ack_received: ago(info.tcpi_last_ack_recv),
    })
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream, UdpSocket},
        thread,
    };

    use super::*;

    #[test]
    fn what_a_receiver_does_not_take_is_told_until_it_does() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        sender.set_nonblocking(true).unwrap();
        let mut left = 0;
        while let Ok(written) = sender.write(&[7; 64 * 1024]) {
            left += written;
        }
        // Of so much, some does not fit into the receiver's window.
        let before = tcp_info(&sender).unwrap();
        assert!(before.not_sent > 0, "{before:?}");
        assert!(before.last_ack_received < Duration::from_secs(60), "{before:?}");
        while left > 0 {
            left -= receiver.read(&mut [0; 64 * 1024]).unwrap();
        }
        loop {
            let now = tcp_info(&sender).unwrap();
            if now.has_arrived() {
                assert!(!now.is_closed);
                break;
            }
            thread::yield_now();
        }
    }

    #[test]
    fn a_reset_closes() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        sender.write_all(b"unread").unwrap();
        drop(listener);
        while !tcp_info(&sender).unwrap().is_closed {
            thread::yield_now();
        }
    }

    #[test]
    fn what_is_not_of_tcp_is_an_error() {
        tcp_info(UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap_err();
    }
}
