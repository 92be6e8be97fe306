//! What each thread may ask of the kernel. The lists are as short as the tests allow: a thread that calls anything else
//! is killed, and the process with it.

use libc::{
    CLONE_THREAD, EFD_CLOEXEC, EFD_NONBLOCK, F_DUPFD_CLOEXEC, F_GETFL, F_SETFD, F_SETFL, MAP_ANONYMOUS,
    O_ACCMODE, O_CREAT, O_TRUNC, PR_SET_NAME, PR_SET_NO_NEW_PRIVS, PROT_EXEC, SIGABRT, SIGBUS, SIGSEGV,
    c_int, c_long,
};

/// A thread of cvmm, by what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Builds the machine, waits for its end, takes it down, and builds the next one after a reboot.
    Main,
    /// Serves queues and backends of the devices.
    Events,
    /// Runs one vCPU and serves its exits.
    Vcpu,
    /// Reads and writes a disk where `io_uring` is not to be had.
    Disk,
    /// Fetches a TD's quotes from the host's service.
    Quotes,
}

/// What some machines need and others do not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Powers {
    /// A guest may connect to sockets of the host, and the host to the guest.
    pub vsock: bool,
    /// A guest gets certificates from a file that is read at each request.
    pub certs: bool,
    /// A guest gets quotes from a service of the host.
    pub quotes: bool,
}

/// What an argument of a call must be.
#[derive(Clone, Copy, Debug)]
pub(super) enum Check {
    /// Argument number and value, 32 bits.
    Is(u8, u32),
    /// Argument number, bits that are looked at, and their values.
    Bits(u8, u32, u32),
    /// Argument number: this process's id.
    Own(u8),
    /// Argument number: the signal that takes a vCPU out of the guest.
    Kick(u8),
}

/// A call that is allowed if all checks pass.
pub(super) type Rule = (c_long, &'static [Check]);

use Check::{Bits, Is, Kick, Own};

const fn bits(flags: c_int) -> u32 {
    flags.cast_unsigned()
}

/// Every thread: memory without code in it, locks, descriptors that are open, time, and an orderly end. The handlers
/// of fatal signals are there so that a crash looks like one.
const EVERY: &[Rule] = &[
    (libc::SYS_read, &[]),
    (libc::SYS_write, &[]),
    (libc::SYS_close, &[]),
    // The standard library's debug builds ask before each close.
    (libc::SYS_fcntl, &[Is(1, bits(libc::F_GETFD))]),
    (libc::SYS_futex, &[]),
    (
        libc::SYS_mmap,
        &[
            Bits(2, bits(PROT_EXEC), 0),
            Bits(3, bits(MAP_ANONYMOUS), bits(MAP_ANONYMOUS)),
        ],
    ),
    (libc::SYS_mprotect, &[Bits(2, bits(PROT_EXEC), 0)]),
    (libc::SYS_munmap, &[]),
    (libc::SYS_mremap, &[]),
    (libc::SYS_madvise, &[]),
    (libc::SYS_brk, &[]),
    (libc::SYS_clock_gettime, &[]),
    (libc::SYS_clock_nanosleep, &[]),
    (libc::SYS_getrandom, &[]),
    (libc::SYS_sched_yield, &[]),
    (libc::SYS_sched_getaffinity, &[]),
    (libc::SYS_restart_syscall, &[]),
    (libc::SYS_gettid, &[]),
    (libc::SYS_getpid, &[]),
    (libc::SYS_rt_sigreturn, &[]),
    (libc::SYS_rt_sigprocmask, &[]),
    (libc::SYS_sigaltstack, &[]),
    (libc::SYS_rt_sigaction, &[Is(0, bits(SIGABRT))]),
    (libc::SYS_rt_sigaction, &[Is(0, bits(SIGBUS))]),
    (libc::SYS_rt_sigaction, &[Is(0, bits(SIGSEGV))]),
    (libc::SYS_tgkill, &[Own(0), Is(2, bits(SIGABRT))]),
    (libc::SYS_exit, &[]),
    (libc::SYS_exit_group, &[]),
];

/// Devices, on whatever thread: events, the console, frames, the disk's ring, and restoring a terminal when cvmm panics.
const DEVICES: &[Rule] = &[
    (libc::SYS_epoll_ctl, &[]),
    (libc::SYS_eventfd2, &[Is(1, bits(EFD_CLOEXEC | EFD_NONBLOCK))]),
    (libc::SYS_timerfd_settime, &[]),
    (libc::SYS_poll, &[]),
    (libc::SYS_ppoll, &[]),
    (libc::SYS_readv, &[]),
    (libc::SYS_writev, &[]),
    (libc::SYS_io_uring_enter, &[]),
];

/// I/O on a disk that is no ring's.
const DISK: &[Rule] = &[
    (libc::SYS_preadv2, &[]),
    (libc::SYS_pwritev2, &[]),
    (libc::SYS_fdatasync, &[]),
    (libc::SYS_fallocate, &[]),
];

const EVENTS: &[Rule] = &[
    (libc::SYS_epoll_wait, &[]),
    (libc::SYS_epoll_pwait, &[]),
    // Clients of the console's socket.
    (libc::SYS_accept4, &[]),
    (libc::SYS_fcntl, &[Is(1, bits(F_DUPFD_CLOEXEC))]),
];

/// Connections of the guest to sockets of the host.
const VSOCK: &[Rule] = &[
    (libc::SYS_socket, &[Is(0, bits(libc::AF_UNIX))]),
    (libc::SYS_connect, &[]),
    (libc::SYS_recvfrom, &[]),
    (libc::SYS_sendto, &[]),
    (libc::SYS_shutdown, &[]),
];

/// A connection to the host's quote service for each request; the guest is told by `KVM_SIGNAL_MSI`.
const QUOTES: &[Rule] = &[
    (libc::SYS_socket, &[Is(0, bits(libc::AF_UNIX))]),
    (libc::SYS_socket, &[Is(0, bits(libc::AF_VSOCK))]),
    (libc::SYS_connect, &[]),
    (
        libc::SYS_getsockopt,
        &[Is(1, bits(libc::SOL_SOCKET)), Is(2, bits(libc::SO_ERROR))],
    ),
    (libc::SYS_sendto, &[]),
    (libc::SYS_recvfrom, &[]),
    (libc::SYS_poll, &[]),
    (libc::SYS_ppoll, &[]),
];

/// Conversions punch holes into guest_memfd.
const VCPU: &[Rule] = &[(libc::SYS_fallocate, &[])];

/// The file of certificates, read and locked anew for each request.
const CERTS: &[Rule] = &[
    (
        libc::SYS_openat,
        &[Bits(2, bits(O_ACCMODE | O_CREAT | O_TRUNC), 0)],
    ),
    (libc::SYS_flock, &[]),
    (libc::SYS_fstat, &[]),
    (libc::SYS_statx, &[]),
    (libc::SYS_lseek, &[]),
];

/// Building and taking down: threads, rings, maps of files, sockets to passt; ends of sockets and of terminals.
const MAIN: &[Rule] = &[
    (
        libc::SYS_clone,
        &[Bits(0, bits(CLONE_THREAD), bits(CLONE_THREAD))],
    ),
    // Answered with ENOSYS by a filter of its own: its flags are in memory, where no filter can see them.
    (libc::SYS_clone3, &[]),
    (libc::SYS_rseq, &[]),
    (libc::SYS_set_robust_list, &[]),
    (libc::SYS_prctl, &[Is(0, bits(PR_SET_NAME))]),
    (libc::SYS_prctl, &[Is(0, bits(PR_SET_NO_NEW_PRIVS))]),
    (libc::SYS_seccomp, &[]),
    (libc::SYS_rt_sigaction, &[Kick(0)]),
    // glibc's SIGSETXID, for which it installs a handler with the first thread.
    (libc::SYS_rt_sigaction, &[Is(0, 33)]),
    (libc::SYS_tgkill, &[Own(0), Kick(2)]),
    (libc::SYS_mmap, &[Bits(2, bits(PROT_EXEC), 0)]),
    (libc::SYS_io_uring_setup, &[]),
    (libc::SYS_io_uring_register, &[]),
    (libc::SYS_epoll_create1, &[]),
    (libc::SYS_timerfd_create, &[]),
    (libc::SYS_eventfd2, &[]),
    (libc::SYS_fcntl, &[Is(1, bits(F_SETFD))]),
    (libc::SYS_fcntl, &[Is(1, bits(F_GETFL))]),
    (libc::SYS_fcntl, &[Is(1, bits(F_SETFL))]),
    (libc::SYS_fstat, &[]),
    (libc::SYS_fstatfs, &[]),
    (libc::SYS_statx, &[]),
    (libc::SYS_newfstatat, &[]),
    (libc::SYS_lseek, &[]),
    (libc::SYS_pread64, &[]),
    (libc::SYS_socket, &[Is(0, bits(libc::AF_UNIX))]),
    (libc::SYS_connect, &[]),
    (libc::SYS_sendto, &[]),
    (libc::SYS_recvfrom, &[]),
    (libc::SYS_shutdown, &[]),
    (libc::SYS_unlink, &[]),
];

/// Requests of `ioctl` (Linux 7.2: include/uapi/linux/kvm.h, if_tun.h, fs.h, sockios.h; asm-generic/ioctls.h).
pub(super) mod request {
    pub(in crate::sandbox) const KVM_CREATE_VM: u32 = 0xae01;
    pub(in crate::sandbox) const KVM_CHECK_EXTENSION: u32 = 0xae03;
    pub(in crate::sandbox) const KVM_GET_VCPU_MMAP_SIZE: u32 = 0xae04;
    pub(in crate::sandbox) const KVM_GET_SUPPORTED_CPUID: u32 = 0xc008_ae05;
    pub(in crate::sandbox) const KVM_CREATE_VCPU: u32 = 0xae41;
    pub(in crate::sandbox) const KVM_SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
    pub(in crate::sandbox) const KVM_SET_USER_MEMORY_REGION2: u32 = 0x40a0_ae49;
    pub(in crate::sandbox) const KVM_SIGNAL_MSI: u32 = 0x4020_aea5;
    pub(in crate::sandbox) const KVM_SET_GSI_ROUTING: u32 = 0x4008_ae6a;
    pub(in crate::sandbox) const KVM_IRQFD: u32 = 0x4020_ae76;
    pub(in crate::sandbox) const KVM_IOEVENTFD: u32 = 0x4040_ae79;
    pub(in crate::sandbox) const KVM_RUN: u32 = 0xae80;
    pub(in crate::sandbox) const KVM_SET_REGS: u32 = 0x4090_ae82;
    pub(in crate::sandbox) const KVM_GET_SREGS: u32 = 0x8138_ae83;
    pub(in crate::sandbox) const KVM_SET_SREGS: u32 = 0x4138_ae84;
    pub(in crate::sandbox) const KVM_SET_MSRS: u32 = 0x4008_ae89;
    pub(in crate::sandbox) const KVM_SET_FPU: u32 = 0x41a0_ae8d;
    pub(in crate::sandbox) const KVM_SET_CPUID2: u32 = 0x4008_ae90;
    pub(in crate::sandbox) const KVM_SET_MP_STATE: u32 = 0x4004_ae99;
    pub(in crate::sandbox) const KVM_GET_TSC_KHZ: u32 = 0xaea3;
    pub(in crate::sandbox) const KVM_ENABLE_CAP: u32 = 0x4068_aea3;
    pub(in crate::sandbox) const KVM_SET_XCRS: u32 = 0x4188_aea7;
    pub(in crate::sandbox) const KVM_MEMORY_ENCRYPT_OP: u32 = 0xc008_aeba;
    pub(in crate::sandbox) const KVM_SET_MEMORY_ATTRIBUTES: u32 = 0x4020_aed2;
    pub(in crate::sandbox) const KVM_CREATE_GUEST_MEMFD: u32 = 0xc040_aed4;
    pub(in crate::sandbox) const KVM_PRE_FAULT_MEMORY: u32 = 0xc040_aed5;
    pub(in crate::sandbox) const TUNGETIFF: u32 = 0x8004_54d2;
    pub(in crate::sandbox) const TUNSETOFFLOAD: u32 = 0x4004_54d0;
    pub(in crate::sandbox) const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
    pub(in crate::sandbox) const TUNSETQUEUE: u32 = 0x4004_54d9;
    pub(in crate::sandbox) const SIOCGIFMTU: u32 = 0x8921;
    pub(in crate::sandbox) const BLKSSZGET: u32 = 0x1268;
    pub(in crate::sandbox) const BLKPBSZGET: u32 = 0x127b;
    pub(in crate::sandbox) const FIONBIO: u32 = 0x5421;
    pub(in crate::sandbox) const TCSETS: u32 = 0x5402;
    pub(in crate::sandbox) const TCSETS2: u32 = 0x402c_542b;
}
use request::*;

/// The most frequent one first: filters look through them in order.
const VCPU_REQUESTS: &[u32] = &[
    KVM_RUN,
    KVM_SET_MEMORY_ATTRIBUTES,
    KVM_PRE_FAULT_MEMORY,
    KVM_IOEVENTFD,
    KVM_SIGNAL_MSI,
];

/// An interrupt is connected and pointed somewhere when it is raised; a driver chooses offloads and queues.
const DEVICE_REQUESTS: &[u32] = &[KVM_SET_GSI_ROUTING, KVM_IRQFD, TUNSETOFFLOAD, TUNSETQUEUE];

/// On every thread, because any may panic.
const TERMINAL_REQUESTS: &[u32] = &[TCSETS, TCSETS2];

const MAIN_REQUESTS: &[u32] = &[
    KVM_CREATE_VM,
    KVM_CHECK_EXTENSION,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_GET_SUPPORTED_CPUID,
    KVM_CREATE_VCPU,
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
    KVM_SET_REGS,
    KVM_GET_SREGS,
    KVM_SET_SREGS,
    KVM_SET_MSRS,
    KVM_SET_FPU,
    KVM_SET_CPUID2,
    KVM_SET_MP_STATE,
    KVM_GET_TSC_KHZ,
    KVM_ENABLE_CAP,
    KVM_SET_XCRS,
    KVM_MEMORY_ENCRYPT_OP,
    KVM_CREATE_GUEST_MEMFD,
    TUNGETIFF,
    TUNSETVNETHDRSZ,
    SIOCGIFMTU,
    BLKSSZGET,
    BLKPBSZGET,
    FIONBIO,
];

/// Everything that one thread may do.
#[derive(Clone, Debug, Default)]
pub(super) struct List {
    pub(super) rules: Vec<Rule>,
    pub(super) requests: Vec<u32>,
}

impl List {
    fn and(mut self, rules: &[Rule], requests: &[u32]) -> Self {
        self.rules.extend_from_slice(rules);
        self.requests.extend_from_slice(requests);
        self
    }

    /// The list of `thread`. The main thread's holds all others, because a thread has the filters of the one that
    /// made it, and its own.
    pub(super) fn of(thread: Thread, powers: Powers) -> Self {
        let every = Self::default().and(EVERY, &[]);
        let events = |list: Self| {
            let list = list.and(DEVICES, DEVICE_REQUESTS).and(DISK, &[]).and(EVENTS, &[]);
            if powers.vsock { list.and(VSOCK, &[]) } else { list }
        };
        let vcpu = |list: Self| {
            let list = list.and(VCPU, VCPU_REQUESTS).and(DEVICES, DEVICE_REQUESTS);
            if powers.certs { list.and(CERTS, &[]) } else { list }
        };
        let quotes = |list: Self| list.and(QUOTES, &[KVM_SIGNAL_MSI]);
        let list = match thread {
            Thread::Main => {
                let list = events(vcpu(every)).and(MAIN, MAIN_REQUESTS);
                if powers.quotes { quotes(list) } else { list }
            }
            Thread::Events => events(every),
            Thread::Vcpu => vcpu(every),
            Thread::Disk => every.and(DISK, &[]),
            Thread::Quotes => quotes(every),
        };
        list.and(&[], TERMINAL_REQUESTS)
    }
}
