// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commands as clients write them: arrays of bulk strings, or words on a line.
//!
//! Bytes arrive in pieces of any size. [`Parser`] keeps how far it got, so that no byte of a
//! command is looked at twice, however many pieces it comes in. Arguments are not copied: they are
//! ranges of the buffer that the caller keeps. Everything here comes from the network, and
//! everything has a bound.

use std::fmt;
use std::ops::Range;

/// The longest line of words, and the most bytes that are searched for the end of one.
const INMAX_LINE: usize = 64 << 10;
/// The most arguments of a command.
const MAX_ARGUMENTS: i64 = 1 << 20;
/// The longest line that gives a length: a letter, twenty digits, a line end, and some more.
const MAX_HEADER: usize = 32;
/// Room for this many arguments is kept from one command to the next.
const KEPT_ARGUMENTS: usize = 1024;

/// How long what a client sends may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// One argument.
    pub(crate) bulk: usize,
    /// One command with all its arguments.
    pub(crate) command: usize,
}

impl Limits {
    /// Limits for arguments of so many bytes.
    pub(crate) fn for_bulk(bulk: usize) -> Self {
        Self { bulk, command: bulk.saturating_mul(4).max(INMAX_LINE) }
    }
}

/// The client sent what is no command. Nothing behind it can be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProtocolError {
    ArrayLength,
    BulkLength,
    NotABulk(u8),
    Unterminated,
    LongLine,
    Quotes,
    LongCommand,
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Protocol error: ")?;
        match self {
            Self::ArrayLength => formatter.write_str("invalid multibulk length"),
            Self::BulkLength => formatter.write_str("invalid bulk length"),
            Self::NotABulk(got) if got.is_ascii_graphic() => {
                write!(formatter, "expected '$', got '{}'", char::from(*got))
            }
            Self::NotABulk(_) => formatter.write_str("expected '$', got ' '"),
            Self::Unterminated => formatter.write_str("no line end behind a bulk"),
            Self::LongLine => formatter.write_str("too big inline request"),
            Self::Quotes => formatter.write_str("unbalanced quotes in request"),
            Self::LongCommand => formatter.write_str("too big command"),
        }
    }
}

/// A whole command.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request<'a> {
    bytes: &'a [u8],
    arguments: &'a [Range<usize>],
}

impl<'a> Request<'a> {
    /// The command as an array of bulk strings, as it can be passed on.
    pub(crate) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// How many arguments there are, the name of the command among them. None at all when the
    /// client sent an empty line.
    pub(crate) fn len(&self) -> usize {
        self.arguments.len()
    }

    /// An argument; an empty one when there are not so many.
    pub(crate) fn get(&self, index: usize) -> &'a [u8] {
        match self.arguments.get(index) {
            Some(range) => &self.bytes[range.clone()],
            None => b"",
        }
    }

    /// The arguments from this one on.
    pub(crate) fn from(&self, index: usize) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let bytes = self.bytes;
        self.arguments.iter().skip(index).map(move |range| &bytes[range.clone()])
    }
}

/// What has been found of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing yet.
    Start,
    /// So many arguments are to come; the header of the first of them is at `at`.
    Header { left: usize, at: usize },
    /// So many arguments are to come; the bytes of the first of them are at `at`.
    Body { left: usize, at: usize, len: usize },
    /// It is whole, and so long.
    Whole { len: usize },
    /// It was a line, and so long. Its words are in the parser's own buffer.
    Line { len: usize },
}

/// Finds one command after the other.
#[derive(Debug)]
pub(crate) struct Parser {
    limits: Limits,
    state: State,
    arguments: Vec<Range<usize>>,
    /// The words of a line, written as an array of bulk strings.
    line: Vec<u8>,
    /// How much of a line has been searched for its end.
    searched: usize,
}

impl Parser {
    pub(crate) fn new(limits: Limits) -> Self {
        let (arguments, line) = (Vec::new(), Vec::new());
        Self { limits, state: State::Start, arguments, line, searched: 0 }
    }

    /// Looks for the end of the command that `bytes` starts with: the same bytes as in the call
    /// before, and what has come since. Gives the length of the command once it is whole, by which
    /// the caller moves on after [`take`](Self::take).
    pub(crate) fn parse(&mut self, bytes: &[u8]) -> Result<Option<usize>, ProtocolError> {
        loop {
            self.state = match self.state {
                State::Start => match bytes.first() {
                    None => return Ok(None),
                    Some(b'*') => match self.array(bytes)? {
                        Some(state) => state,
                        None => return Ok(None),
                    },
                    Some(_) => match self.line(bytes)? {
                        Some(state) => state,
                        None => return Ok(None),
                    },
                },
                State::Header { left, at } => match self.header(bytes, left, at)? {
                    Some(state) => state,
                    None => return Ok(None),
                },
                State::Body { left, at, len } => match self.body(bytes, left, at, len)? {
                    Some(state) => state,
                    None => return Ok(None),
                },
                State::Whole { len } | State::Line { len } => return Ok(Some(len)),
            };
        }
    }

    /// How long the command will be at least, as far as is known.
    pub(crate) fn expected_len(&self) -> usize {
        match self.state {
            State::Body { at, len, .. } => at + len + 2,
            _ => 0,
        }
    }

    /// The command that was found at the start of `bytes`.
    pub(crate) fn request<'a>(&'a self, bytes: &'a [u8]) -> Request<'a> {
        let bytes = match self.state {
            State::Whole { len } => &bytes[..len],
            State::Line { .. } => &self.line,
            _ => return Request { bytes: b"", arguments: &[] },
        };
        Request { bytes, arguments: &self.arguments }
    }

    /// Goes on to the next command.
    pub(crate) fn take(&mut self) {
        self.state = State::Start;
        self.searched = 0;
        self.arguments.clear();
        self.arguments.shrink_to(KEPT_ARGUMENTS);
    }

    fn array(&self, bytes: &[u8]) -> Result<Option<State>, ProtocolError> {
        let Some((count, at)) = number(bytes, 0, ProtocolError::ArrayLength)? else {
            return Ok(None);
        };
        match count {
            i64::MIN..=0 => Ok(Some(State::Whole { len: at })),
            1..=MAX_ARGUMENTS => Ok(Some(State::Header { left: count as usize, at })),
            _ => Err(ProtocolError::ArrayLength),
        }
    }

    fn header(&self, bytes: &[u8], left: usize, at: usize) -> Result<Option<State>, ProtocolError> {
        match bytes.get(at) {
            None => return Ok(None),
            Some(b'$') => {}
            Some(&got) => return Err(ProtocolError::NotABulk(got)),
        }
        let Some((len, at)) = number(bytes, at, ProtocolError::BulkLength)? else {
            return Ok(None);
        };
        let len = usize::try_from(len).map_err(|_| ProtocolError::BulkLength)?;
        if len > self.limits.bulk {
            return Err(ProtocolError::BulkLength);
        }
        // Neither addition overflows: both are bounded by then.
        if at + len > self.limits.command {
            return Err(ProtocolError::LongCommand);
        }
        Ok(Some(State::Body { left, at, len }))
    }

    fn body(
        &mut self,
        bytes: &[u8],
        left: usize,
        at: usize,
        len: usize,
    ) -> Result<Option<State>, ProtocolError> {
        let end = at + len;
        let Some(behind) = bytes.get(end..end + 2) else {
            return Ok(None);
        };
        if behind != b"\r\n" {
            return Err(ProtocolError::Unterminated);
        }
        self.arguments.push(at..end);
        Ok(Some(match left {
            1 => State::Whole { len: end + 2 },
            _ => State::Header { left: left - 1, at: end + 2 },
        }))
    }

    fn line(&mut self, bytes: &[u8]) -> Result<Option<State>, ProtocolError> {
        let window = &bytes[..bytes.len().min(INMAX_LINE)];
        let found = window[self.searched..].iter().position(|&byte| byte == b'\n');
        let Some(end) = found.map(|found| self.searched + found) else {
            self.searched = window.len();
            let is_full = window.len() == INMAX_LINE;
            return if is_full { Err(ProtocolError::LongLine) } else { Ok(None) };
        };
        let line = bytes[..end].strip_suffix(b"\r").unwrap_or(&bytes[..end]);
        let words = words(line)?;
        self.line.clear();
        self.line.extend(format!("*{}\r\n", words.len()).bytes());
        for word in words {
            self.line.extend(format!("${}\r\n", word.len()).bytes());
            let start = self.line.len();
            self.line.extend(word);
            self.arguments.push(start..self.line.len());
            self.line.extend(b"\r\n");
        }
        Ok(Some(State::Line { len: end + 1 }))
    }
}

/// The number behind the letter at `at`, and where the next line starts.
fn number(
    bytes: &[u8],
    at: usize,
    wrong: ProtocolError,
) -> Result<Option<(i64, usize)>, ProtocolError> {
    let rest = &bytes[at + 1..];
    let window = &rest[..rest.len().min(MAX_HEADER)];
    let Some(end) = window.iter().position(|&byte| byte == b'\n') else {
        return if window.len() == MAX_HEADER { Err(wrong) } else { Ok(None) };
    };
    let digits = window[..end].strip_suffix(b"\r").ok_or(wrong)?;
    let value = integer(digits).ok_or(wrong)?;
    Ok(Some((value, at + 1 + end + 1)))
}

/// A number as Redis writes it: no sign but a minus, no zeros in front, no spaces.
pub(crate) fn integer(digits: &[u8]) -> Option<i64> {
    let (is_negative, digits) = match digits {
        [b'-', rest @ ..] => (true, rest),
        _ => (false, digits),
    };
    match digits {
        [b'0'] if !is_negative => return Some(0),
        [b'1'..=b'9', ..] if digits.len() <= 19 => {}
        _ => return None,
    }
    digits.iter().try_fold(0_i64, |value, &digit| {
        let digit = i64::from(digit.is_ascii_digit().then(|| digit - b'0')?);
        let value = value.checked_mul(10)?;
        if is_negative { value.checked_sub(digit) } else { value.checked_add(digit) }
    })
}

/// The words of a line. Quoted ones can hold anything: `"a\x00\n"`, `'as it is'`.
fn words(line: &[u8]) -> Result<Vec<Vec<u8>>, ProtocolError> {
    let mut words = Vec::new();
    let mut rest = line;
    loop {
        rest = rest.trim_ascii_start();
        if rest.is_empty() {
            return Ok(words);
        }
        let mut word = Vec::new();
        rest = read_word(rest, &mut word)?;
        words.push(word);
    }
}

/// Takes a word off the front of a line, and gives what is behind it.
fn read_word<'a>(mut rest: &'a [u8], word: &mut Vec<u8>) -> Result<&'a [u8], ProtocolError> {
    loop {
        match rest {
            [] => return Ok(rest),
            [space, ..] if space.is_ascii_whitespace() => return Ok(rest),
            [b'"', quoted @ ..] => return end_of_quotes(read_double_quoted(quoted, word)?),
            [b'\'', quoted @ ..] => return end_of_quotes(read_single_quoted(quoted, word)?),
            [byte, more @ ..] => {
                word.push(*byte);
                rest = more;
            }
        }
    }
}

fn read_double_quoted<'a>(
    mut rest: &'a [u8],
    word: &mut Vec<u8>,
) -> Result<&'a [u8], ProtocolError> {
    loop {
        let (byte, behind) = match rest {
            [] => return Err(ProtocolError::Quotes),
            [b'"', behind @ ..] => return Ok(behind),
            [b'\\', b'x', high, low, behind @ ..]
                if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() =>
            {
                (hex(*high) << 4 | hex(*low), behind)
            }
            [b'\\', escaped, behind @ ..] => (unescape(*escaped), behind),
            [byte, behind @ ..] => (*byte, behind),
        };
        word.push(byte);
        rest = behind;
    }
}

fn read_single_quoted<'a>(
    mut rest: &'a [u8],
    word: &mut Vec<u8>,
) -> Result<&'a [u8], ProtocolError> {
    loop {
        let (byte, behind) = match rest {
            [] => return Err(ProtocolError::Quotes),
            [b'\\', b'\'', behind @ ..] => (b'\'', behind),
            [b'\'', behind @ ..] => return Ok(behind),
            [byte, behind @ ..] => (*byte, behind),
        };
        word.push(byte);
        rest = behind;
    }
}

/// Behind the closing quotes a word is over.
fn end_of_quotes(rest: &[u8]) -> Result<&[u8], ProtocolError> {
    match rest {
        [next, ..] if !next.is_ascii_whitespace() => Err(ProtocolError::Quotes),
        _ => Ok(rest),
    }
}

fn unescape(byte: u8) -> u8 {
    match byte {
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        b'b' => 8,
        b'a' => 7,
        other => other,
    }
}

fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        b'a'..=b'f' => digit - b'a' + 10,
        _ => digit - b'A' + 10,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Words = Vec<Vec<u8>>;

    fn limits() -> Limits {
        Limits { bulk: 1 << 20, command: 4 << 20 }
    }

    /// Feeds the pieces one after the other. Gives the commands, and what ended it.
    fn parse_pieces(pieces: &[&[u8]]) -> (Vec<Words>, Option<ProtocolError>) {
        let mut parser = Parser::new(limits());
        let mut buffer = Vec::new();
        let mut start = 0;
        let mut commands = Vec::new();
        for piece in pieces {
            buffer.extend_from_slice(piece);
            loop {
                match parser.parse(&buffer[start..]) {
                    Ok(None) => break,
                    Ok(Some(len)) => {
                        let request = parser.request(&buffer[start..]);
                        commands.push(request.from(0).map(<[u8]>::to_vec).collect());
                        parser.take();
                        start += len;
                    }
                    Err(error) => return (commands, Some(error)),
                }
            }
        }
        (commands, None)
    }

    fn encode(words: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            bytes.extend(format!("${}\r\n", word.len()).bytes());
            bytes.extend(word);
            bytes.extend(b"\r\n");
        }
        bytes
    }

    fn strings(words: &[&str]) -> Words {
        words.iter().map(|word| word.as_bytes().to_vec()).collect()
    }

    #[test]
    fn a_pipeline_is_the_same_wherever_it_is_cut() {
        let input: &[u8] = b"*2\r\n$3\r\nGET\r\n$4\r\na\r\nb\r\n\r\nset  k \"a\\x00b\" \r\n*0\r\n\
            *1\r\n$0\r\n\r\nPING\n*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$5\r\n*1\r\n$\r\n*-1\r\n";
        let expected = [
            strings(&["GET", "a\r\nb"]),
            vec![],
            strings(&["set", "k", "a\0b"]),
            vec![],
            strings(&[""]),
            strings(&["PING"]),
            strings(&["SET", "k", "*1\r\n$"]),
            vec![],
        ];
        for first in 0..=input.len() {
            for second in first..=input.len() {
                let pieces = [&input[..first], &input[first..second], &input[second..]];
                let (commands, error) = parse_pieces(&pieces);
                assert_eq!(error, None, "cut at {first} and {second}");
                assert_eq!(commands, expected, "cut at {first} and {second}");
            }
        }
        let bytes: Vec<&[u8]> = input.chunks(1).collect();
        assert_eq!(parse_pieces(&bytes).0, expected);
    }

    #[test]
    fn a_line_is_passed_on_as_an_array() {
        let mut parser = Parser::new(limits());
        let input = b"GET 'a\\'b'\r\n*1\r\n";
        assert_eq!(parser.parse(input), Ok(Some(12)));
        assert_eq!(parser.request(input).bytes(), encode(&strings(&["GET", "a'b"])));
    }

    #[test]
    fn what_is_no_command_is_refused_by_name() {
        use ProtocolError::*;
        let long_line = [b'x'; INMAX_LINE];
        let refused: &[(&[u8], ProtocolError)] = &[
            (b"*x\r\n", ArrayLength),
            (b"*+1\r\n", ArrayLength),
            (b"* 1\r\n", ArrayLength),
            (b"*01\r\n", ArrayLength),
            (b"*1\n", ArrayLength),
            (b"*1048577\r\n", ArrayLength),
            (b"*9223372036854775808\r\n", ArrayLength),
            (b"*11111111111111111111111111111111", ArrayLength),
            (b"*1\r\n$-1\r\n", BulkLength),
            (b"*1\r\n$1048577\r\n", BulkLength),
            (b"*1\r\n$9223372036854775807\r\n", BulkLength),
            (b"*1\r\n$\r\n", BulkLength),
            (b"*1\r\n:1\r\n", NotABulk(b':')),
            (b"*1\r\n\0", NotABulk(0)),
            (b"*1\r\n$1\r\nab\r\n", Unterminated),
            (b"*1\r\n$1\r\na\n\n", Unterminated),
            (b"get \"a\r\n", Quotes),
            (b"get 'a\r\n", Quotes),
            (b"get \"a\"b\r\n", Quotes),
            (&long_line, LongLine),
        ];
        for (input, expected) in refused {
            let (commands, error) = parse_pieces(&[input]);
            assert!(commands.is_empty());
            assert_eq!(error, Some(*expected), "{}", input.escape_ascii());
            let bytes: Vec<&[u8]> = input.chunks(1).collect();
            assert_eq!(parse_pieces(&bytes).1, Some(*expected), "{}", input.escape_ascii());
        }
        assert_eq!(NotABulk(b':').to_string(), "Protocol error: expected '$', got ':'");
    }

    #[test]
    fn a_command_has_a_length_at_most() {
        let mut parser = Parser::new(Limits { bulk: 100, command: 150 });
        let mut input = b"*3\r\n$100\r\n".to_vec();
        input.extend([b'x'; 100]);
        input.extend(b"\r\n$50\r\n");
        assert_eq!(parser.parse(&input), Err(ProtocolError::LongCommand));
    }

    #[test]
    fn the_expected_length_grows_with_what_is_known() {
        let mut parser = Parser::new(limits());
        assert_eq!(parser.parse(b"*1\r\n$10"), Ok(None));
        assert_eq!(parser.expected_len(), 0);
        assert_eq!(parser.parse(b"*1\r\n$1000\r\nab"), Ok(None));
        assert_eq!(parser.expected_len(), 4 + 7 + 1000 + 2);
    }

    #[test]
    fn integers_are_those_of_redis() {
        for text in ["0", "7", "-1", "9223372036854775807", "-9223372036854775808"] {
            assert_eq!(integer(text.as_bytes()), Some(text.parse().unwrap()));
        }
        let wrong = ["", "-", "-0", "00", "+1", " 1", "1 ", "1.0", "0x1", "9223372036854775808"];
        for text in wrong {
            assert_eq!(integer(text.as_bytes()), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_found_again(
            commands in prop::collection::vec(
                prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..6),
                0..8,
            ),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let input: Vec<u8> = commands.iter().flat_map(|words| encode(words)).collect();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(input.len() + 1)).collect();
            cuts.extend([0, input.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &input[cut[0]..cut[1]]).collect();
            prop_assert_eq!(parse_pieces(&pieces), (commands, None));
        }

        #[test]
        fn whatever_comes_nothing_breaks(input in prop::collection::vec(
            prop::sample::select(b"*$1290-\r\n \"'x\0\\".to_vec()), 0..60,
        )) {
            let whole = parse_pieces(&[&input]);
            let bytes: Vec<&[u8]> = input.chunks(1).collect();
            prop_assert_eq!(parse_pieces(&bytes), whole);
        }
    }
}
