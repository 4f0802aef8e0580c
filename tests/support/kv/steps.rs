// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commands and what Redis answers to them, as `redis-cli` prints it.

/// Has each command asked, and checks what is printed for the answer. Each may have a connection of
/// its own.
pub(crate) fn check(ask: impl Fn(&[&str]) -> String) {
    let wrong_number = |name| format!("ERR wrong number of arguments for '{name}' command\n\n");
    let (get, mset, ping) = (wrong_number("get"), wrong_number("mset"), wrong_number("ping"));
    let not_an_integer = "ERR value is not an integer or out of range\n\n";
    let overflow = "ERR increment or decrement would overflow\n\n";
    let steps: &[(&str, &str)] = &[
        ("ping", "PONG\n"),
        ("PING hello", "hello\n"),
        ("ping a b", &ping),
        ("echo x", "x\n"),
        ("flushall", "OK\n"),
        ("dbsize", "0\n"),
        ("get a", "\n"),
        ("get", &get),
        ("set a 1", "OK\n"),
        ("get a", "1\n"),
        ("set a 2 NX", "\n"),
        ("set a 2 XX GET", "1\n"),
        ("set b 2 XX", "\n"),
        ("set b 2 nx get", "\n"),
        ("set a", "ERR wrong number of arguments for 'set' command\n\n"),
        ("set a 1 NX XX", "ERR syntax error\n\n"),
        ("set a 1 EX", "ERR syntax error\n\n"),
        ("set a 1 EX 10 PX 10", "ERR syntax error\n\n"),
        ("set a 1 EX 0", "ERR invalid expire time in 'set' command\n\n"),
        ("set a 1 EX x", not_an_integer),
        ("set a 1 EX 9223372036854775807", "ERR invalid expire time in 'set' command\n\n"),
        ("get a", "2\n"),
        ("ttl a", "-1\n"),
        ("ttl nowhere", "-2\n"),
        ("pttl nowhere", "-2\n"),
        ("expire nowhere 100", "0\n"),
        ("expire a 1000", "1\n"),
        ("ttl a", "1000\n"),
        ("set a 3 KEEPTTL", "OK\n"),
        ("ttl a", "1000\n"),
        ("persist a", "1\n"),
        ("persist a", "0\n"),
        ("pexpire a 500000", "1\n"),
        ("ttl a", "500\n"),
        ("set a 4", "OK\n"),
        ("ttl a", "-1\n"),
        ("setex a 600 5", "OK\n"),
        ("ttl a", "600\n"),
        ("expire a -1", "1\n"),
        ("exists a", "0\n"),
        ("expire a x", not_an_integer),
        ("incr n", "1\n"),
        ("incrby n 41", "42\n"),
        ("decr n", "41\n"),
        ("decrby n 40", "1\n"),
        ("incrby n x", not_an_integer),
        ("set n text", "OK\n"),
        ("incr n", not_an_integer),
        ("set n 9223372036854775807", "OK\n"),
        ("incr n", overflow),
        ("decrby n -9223372036854775808", "ERR decrement would overflow\n\n"),
        ("mset k1 v1 k2 v2 k3 v3 k4 v4", "OK\n"),
        ("mset k1 v1 k2", &mset),
        ("mget k1 k2 nowhere k3 k4 k1", "v1\nv2\n\nv3\nv4\nv1\n"),
        ("exists k1 k2 k3 k4 k1 nowhere", "5\n"),
        ("del k1 k2 k3 nowhere", "3\n"),
        ("dbsize", "3\n"),
        ("select 0", "OK\n"),
        ("select 1", "ERR DB index is out of range\n\n"),
        ("select x", not_an_integer),
        ("config get save", "\n"),
        ("command", "\n"),
        ("client setname me", "OK\n"),
        ("client getname", "\n"),
        ("client setinfo lib-name x", "OK\n"),
        ("hello 4", "NOPROTO unsupported protocol version\n\n"),
        ("scan x", "ERR invalid cursor\n\n"),
        ("scan 0 COUNT 0", "ERR syntax error\n\n"),
        ("scan 0 MATCH", "ERR syntax error\n\n"),
        ("nonsense a b", "ERR unknown command 'nonsense', with args beginning with: 'a' 'b' \n\n"),
        ("flushdb async", "OK\n"),
        ("dbsize", "0\n"),
        ("quit", "OK\n"),
    ];
    for (command, expected) in steps {
        let words: Vec<&str> = command.split(' ').collect();
        let answer = ask(&words);
        let number = |text: &str| text.trim_end().parse().ok().filter(|number: &i64| *number > 0);
        match (words[0], number(expected), number(&answer)) {
            // A machine that is busy with other things takes its time between two of them.
            ("ttl", Some(most), Some(left)) => {
                assert!((most - 100..=most).contains(&left), "{command}: {answer}");
            }
            _ => assert_eq!(answer, *expected, "{command}"),
        }
    }
}
