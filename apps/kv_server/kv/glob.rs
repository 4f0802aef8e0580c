// SPDX-License-Identifier: MIT OR Apache-2.0
//! Patterns for keys: `*`, `?`, `[a-c]`, `[^x]`, and `\` before what is meant as it is.

/// Whether a text fits a pattern.
///
/// Takes at most the product of the two lengths: a `*` that fits is never given up for the sake of
/// one before it.
pub(crate) fn fits(pattern: &[u8], text: &[u8]) -> bool {
    let (mut pattern, mut text) = (pattern, text);
    // Behind the last star, and what of the text it has left.
    let mut star: Option<(&[u8], &[u8])> = None;
    loop {
        let step = match (pattern, text) {
            ([b'*', rest @ ..], _) => {
                star = Some((rest, text));
                pattern = rest;
                continue;
            }
            ([], []) => return true,
            (_, [byte, behind @ ..]) => one(pattern, *byte).map(|rest| (rest, behind)),
            (_, []) => None,
        };
        match (step, star) {
            (Some(next), _) => (pattern, text) = next,
            // The star takes one byte more.
            (None, Some((rest, [_, behind @ ..]))) => {
                star = Some((rest, behind));
                (pattern, text) = (rest, behind);
            }
            (None, _) => return false,
        }
    }
}

/// What is left of a pattern when its first element fits a byte.
fn one(pattern: &[u8], byte: u8) -> Option<&[u8]> {
    match pattern {
        [b'?', rest @ ..] => Some(rest),
        [b'[', rest @ ..] => one_of(rest, byte),
        [b'\\', escaped, rest @ ..] => (*escaped == byte).then_some(rest),
        [expected, rest @ ..] => (*expected == byte).then_some(rest),
        [] => None,
    }
}

/// `set` stands behind its opening bracket. One that is never closed ends with the pattern.
fn one_of(set: &[u8], byte: u8) -> Option<&[u8]> {
    let (is_wanted, mut set) = match set {
        [b'^', rest @ ..] => (false, rest),
        _ => (true, set),
    };
    let mut is_in = false;
    loop {
        set = match set {
            [] => return (is_in == is_wanted).then_some(set),
            [b']', rest @ ..] => return (is_in == is_wanted).then_some(rest),
            [b'\\', member, rest @ ..] => {
                is_in |= *member == byte;
                rest
            }
            [from, b'-', to, rest @ ..] if *to != b']' => {
                is_in |= (*from.min(to)..=*from.max(to)).contains(&byte);
                rest
            }
            [member, rest @ ..] => {
                is_in |= *member == byte;
                rest
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_what_they_fit_in_redis() {
        let fitting = [
            ("", ""),
            ("*", ""),
            ("*", "anything"),
            ("h?llo", "hello"),
            ("h*llo", "heeeello"),
            ("h[ae]llo", "hallo"),
            ("h[^e]llo", "hbllo"),
            ("h[a-b]llo", "hbllo"),
            ("h[b-a]llo", "hallo"),
            ("*a*b*c", "xaxbxbxc"),
            ("a\\*b", "a*b"),
            ("[\\]]", "]"),
            ("key:*:7", "key:12:7:7"),
            ("a[b", "ab"),
        ];
        for (pattern, text) in fitting {
            assert!(fits(pattern.as_bytes(), text.as_bytes()), "{pattern} {text}");
        }
        let not_fitting = [
            ("", "a"),
            ("a", ""),
            ("?", ""),
            ("h?llo", "hllo"),
            ("h[ae]llo", "hillo"),
            ("h[^e]llo", "hello"),
            ("*a", "ab"),
            ("a\\*b", "axb"),
            ("[]", "a"),
            ("*a*b*c", "acb"),
        ];
        for (pattern, text) in not_fitting {
            assert!(!fits(pattern.as_bytes(), text.as_bytes()), "{pattern} {text}");
        }
    }

    #[test]
    fn many_stars_take_no_eternity() {
        let pattern = b"a*".repeat(100);
        let text = [b"a".repeat(10_000), b"b".to_vec()].concat();
        assert!(fits(&pattern, &text));
        assert!(!fits(&[&pattern[..], b"c"].concat(), &text));
    }
}
