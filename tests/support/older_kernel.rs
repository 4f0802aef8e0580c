// SPDX-License-Identifier: MIT OR Apache-2.0
//! A thread, and those that it starts, for which the kernel is an older one.

use std::io;

use nix::libc;

/// `SO_PASSRIGHTS` (Linux 6.16), by which a Unix socket refuses descriptors.
const SO_PASSRIGHTS: u32 = 83;

/// From now on, and for ever, this thread cannot have Unix sockets refuse descriptors: a filter
/// answers as a kernel would that does not know the option.
pub(crate) fn begin() {
    // `setsockopt(_, SOL_SOCKET, SO_PASSRIGHTS, ..)` fails, everything else is as it was. The
    // offsets are those of `struct seccomp_data`; the low half of an argument stands first.
    let load = |offset: u32| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let low = if cfg!(target_endian = "big") { 4 } else { 0 };
    let filter = [
        load(0),
        unless(libc::SYS_setsockopt as u32, 5),
        load(16 + 8 + low),
        unless(libc::SOL_SOCKET as u32, 3),
        load(16 + 16 + low),
        unless(SO_PASSRIGHTS, 1),
        give(libc::SECCOMP_RET_ERRNO | libc::ENOPROTOOPT as u32),
        give(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program outlives the call, which copies it.
    let results = unsafe {
        [
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program),
        ]
    };
    assert_eq!(results, [0, 0], "{}", io::Error::last_os_error());
}

/// Runs a test as on this kernel, and then as on an older one.
pub(crate) fn both(test: fn()) {
    test();
    let older = move || {
        begin();
        test();
    };
    if let Err(panic) = std::thread::spawn(older).join() {
        println!("as on an older kernel");
        std::panic::resume_unwind(panic);
    }
}

fn statement(code: u32, value: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k: value }
}

/// Goes on when the value that was loaded is this one, and past so many statements if not.
fn unless(value: u32, past: u8) -> libc::sock_filter {
    let code = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    libc::sock_filter { code: code as u16, jt: 0, jf: past, k: value }
}

fn give(value: u32) -> libc::sock_filter {
    statement(libc::BPF_RET | libc::BPF_K, value)
}
