// SPDX-License-Identifier: MIT OR Apache-2.0
//! Negotiations that are none, or come where they must not; and servers that answer what they were
//! not asked.

use std::io::ErrorKind;
use std::net::Shutdown;
use std::time::Duration;

use shmipc_glommio::Error::{self, Handshake, Wire};
use shmipc_glommio::wire::negotiation::{JSON_PARSE_ERROR, MAX_DEPTH, VERSION_NOT_SUPPORTED};
use shmipc_glommio::wire::{Features, MAX_NEGOTIATION_LEN, NegotiationResponse};
use shmipc_glommio::{ConfigBuilder, HandshakeError, ProtocolVersion, WireError};

use super::connecting::{RawServer, client_config};
use super::due::{IsDue, due};
use crate::bed;
use crate::support::bed::{Bed, Fate};
use crate::support::negotiated::{
    KINDS, NEGOTIATION, WITH_EVENT_FDS, announced, client, negotiated, negotiation, request,
    selection, server_after_selection, wakeup,
};
use crate::support::raw::{
    ACK, BY_FILE, BY_MEMFD, EXCHANGE, READY, Raw, Rig, SYNC, Stage, at_stage, header, honest_paths,
    message,
};

const LONGEST: usize = MAX_NEGOTIATION_LEN as usize;
const IS_UNEXPECTED: IsDue = due!(Handshake(HandshakeError::Unexpected { .. }));
const IS_JSON: IsDue = due!(Handshake(HandshakeError::Negotiation(WireError::Negotiation(_))));
const IS_VERSION: IsDue = due!(Wire(WireError::Version(_)));
const IS_LENGTH: IsDue = due!(Wire(WireError::Length { .. } | WireError::TooLong { .. }));

/// So many levels of arrays.
fn nested(levels: usize) -> String {
    "[".repeat(levels) + &"]".repeat(levels)
}

/// A request with these versions, and more fields behind.
fn versions(versions: &str, more: &str) -> Vec<u8> {
    let known = r#""sdk_name":"bad","sdk_version":"0""#;
    format!(r#"{{"supports_protocols":{versions},{known}{more}}}"#).into_bytes()
}

/// What is no request. Each with a byte or two at least, since shorter ones have no header.
fn no_requests() -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = [
        "{}",
        "[]",
        "null",
        "1234",
        "true",
        "\"\"",
        "  ",
        "{]",
        "[}",
        "\0\0",
        "\u{feff}{}",
        "--",
        "{\"supports_protocols\":[4]}",
        "{\"\":",
        "nul",
        "[[[[",
        "\"\\",
        "{\"a\":1,}",
        "// {}",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into();
    for wrong in [
        "4",
        "\"4\"",
        "null",
        "{}",
        "[\"4\"]",
        "[4.0]",
        "[-4]",
        "[4,null]",
        "[[4]]",
        "[4e0]",
        "[18446744073709551616]",
        "[1e999]",
        "[4,]",
        "[04]",
        "[0x4]",
        "[NaN]",
        "true",
    ] {
        all.push(versions(wrong, ""));
    }
    for more in [
        r#","supports_features":{}"#,
        r#","supports_features":[1]"#,
        r#","supports_features":"eventfd_wakeup""#,
        r#","supports_features":["\ud800"]"#,
        r#","settings":7"#,
        r#","settings":[1,2,3]"#,
        r#","supports_protocols":[4]"#,
        r#","sdk_name":"again""#,
        r#","unknown":tru"#,
        "}",
        ",",
    ] {
        all.push(versions("[4]", more));
    }
    let good = versions("[4]", "");
    all.push([&good[..], b"x"].concat());
    all.push([&good[..], &good].concat());
    for len in [good.len() - 1, good.len() / 2, 2] {
        all.push(good[..len].to_vec());
    }
    // What is no UTF-8.
    let mut name = good;
    let at = name.windows(3).position(|three| three == b"bad").unwrap();
    name[at] = 0xc0;
    all.push(name);
    // Too deep, by one level and by all that fit.
    all.push(versions("[4]", &format!(",\"x\":{}", nested(MAX_DEPTH))));
    all.push(vec![b'['; LONGEST]);
    all.push(nested(LONGEST / 2).into_bytes());
    all.push(b"{\"a\":".repeat(LONGEST / 5));
    all.push(vec![b'"'; LONGEST]);
    all.push(vec![0xff; LONGEST]);
    all
}

/// The code of the refusal that comes next.
fn refusal(raw: &mut Raw) -> String {
    let (kind, json) = raw.receive_message();
    assert_eq!(kind, NEGOTIATION);
    match NegotiationResponse::decode(&json, Features::default()) {
        Ok(NegotiationResponse::Refused { code, message }) => {
            assert!(!message.is_empty());
            code
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_sends_no_request_is_told_so() {
    let bed = bed();
    let cases = no_requests();
    println!("{} cases", cases.len());
    for json in cases {
        let name = String::from_utf8_lossy(&json[..json.len().min(80)]).into_owned();
        let mut raw = Raw::connect(bed.path());
        raw.send(&negotiation(&json));
        let code = refusal(&mut raw);
        if code != JSON_PARSE_ERROR {
            bed.note(format!("{name}: {code}"));
        }
        bed.must_refuse(&name, IS_JSON, raw);
    }
    bed.finish();
}

#[test]
fn who_offers_other_versions_is_told_so() {
    let bed = bed();
    let not_offered: IsDue = due!(Handshake(HandshakeError::Version4NotOffered));
    for offer in ["[]", "[3]", "[2,3]", "[5]", "[0]", "[40,44]", "[260]", "[18446744073709551615]"]
    {
        let mut raw = Raw::connect(bed.path());
        raw.send(&negotiation(&versions(offer, "")));
        assert_eq!(refusal(&mut raw), VERSION_NOT_SUPPORTED, "{offer}");
        bed.must_refuse(offer, not_offered, raw);
    }
    bed.finish();
}

#[test]
fn what_is_not_known_is_passed_over() {
    let bed = bed();
    let deepest = format!(r#","x":{}"#, nested(MAX_DEPTH - 1));
    let cases = [
        "",
        r#","supports_features":[]"#,
        r#","supports_features":["of_tomorrow","","eventfd_wakeup "]"#,
        r#","settings":{}"#,
        r#","settings":{"shard":{"index":9,"count":1},"of_tomorrow":[{}]}"#,
        r#","settings":{"event_queue_polling":{"polling_interval_us":5}}"#,
        r#","supports_features":["event_queue_polling"]"#,
        r#","supports_features":["event_queue_polling"],"settings":{"event_queue_polling":0}"#,
        r#","supports_features":["event_queue_polling"],
            "settings":{"event_queue_polling":{"polling_interval_us":0}}"#,
        r#","supports_features":["event_queue_polling"],
            "settings":{"event_queue_polling":{"polling_interval_us":-5}}"#,
        r#","supports_features":["event_queue_polling"],
            "settings":{"event_queue_polling":{"polling_interval_us":"5"}}"#,
        r#","selected_protocol":7,"error":{"code":"x"}"#,
        &deepest,
    ];
    for more in cases {
        for offer in ["[4]", "[3,4,5]", "[4,4,4]"] {
            let mut raw = Raw::connect(bed.path());
            let mut json = versions(offer, more);
            // As long as can be.
            json.resize(LONGEST, b' ');
            raw.send(&negotiation(&json));
            let (kind, json) = raw.receive_message();
            let answer = NegotiationResponse::decode(&json, Features::default());
            let due = NegotiationResponse::selecting(Features::default(), None);
            assert_eq!((kind, answer), (NEGOTIATION, Ok(due)), "{more}");
            raw.socket.shutdown(Shutdown::Write).unwrap();
            bed.must_refuse(more, due!(Handshake(HandshakeError::Closed { .. })), raw);
        }
    }
    bed.finish();
}

#[test]
fn a_negotiation_with_a_bad_header_is_not_answered() {
    let bed = bed();
    let of = |length: usize, version| header(length as u32, 0x7758, version, NEGOTIATION);
    let mut cases: Vec<_> = [1, 2, 3, 4, 255].map(|version| (of(100, version), IS_VERSION)).into();
    for length in [0, 7, 8, 9, 8 + LONGEST + 1, 1 << 20, u32::MAX as usize] {
        cases.push((of(length, 0), IS_LENGTH));
    }
    for (bytes, is_due) in cases {
        // At the start, and where an announcement is due.
        for is_first in [true, false] {
            let mut raw = match is_first {
                true => Raw::connect(bed.path()),
                false => negotiated(bed.path(), KINDS[0]),
            };
            raw.send(&bytes);
            assert!(raw.receive_to_end().is_empty(), "{bytes:?}");
            bed.must_refuse(&format!("{bytes:?}, first: {is_first}"), is_due, raw);
        }
    }
    bed.finish();
}

#[test]
fn a_negotiation_in_single_bytes_is_one() {
    let bed = bed();
    for features in KINDS {
        let mut raw = Raw::connect(bed.path());
        for byte in request(features) {
            raw.send(&[byte]);
        }
        let (_, json) = raw.receive_message();
        let due = NegotiationResponse::selecting(features, None);
        assert_eq!(NegotiationResponse::decode(&json, features), Ok(due));
        drop(raw);
        let fate = bed.fate();
        assert!(matches!(fate, Ok(Fate::Refused(_))), "{fate:?}");
    }
    bed.must_go_on("single bytes");
    bed.finish();
}

#[test]
fn a_negotiation_out_of_place_is_refused() {
    let bed = bed();
    let strays: IsDue =
        due!(Handshake(HandshakeError::Descriptors { got: 0, .. } | HandshakeError::StrayBytes));
    for features in KINDS {
        let again = request(features);
        let mut raw = negotiated(bed.path(), features);
        raw.send(&again);
        bed.must_refuse("a second one", IS_UNEXPECTED, raw);
        let mut raw = negotiated(bed.path(), features);
        raw.send(&message(EXCHANGE, 3, &[]));
        bed.must_refuse("versions behind one", IS_UNEXPECTED, raw);
        let mut raw = at_stage(bed.path(), Stage::Announcement);
        raw.send(&again);
        bed.must_refuse("one behind versions", IS_UNEXPECTED, raw);
        let mut raw = announced(bed.path(), features);
        raw.send(&again);
        bed.must_refuse("one for descriptors", strays, raw);
        let mut raw = Raw::connect(bed.path());
        raw.send(&[again.clone(), again.clone()].concat());
        bed.must_refuse("two at once", IS_UNEXPECTED, raw);
        // An answer is no request.
        let mut raw = Raw::connect(bed.path());
        raw.send(&selection(features));
        assert_eq!(refusal(&mut raw), JSON_PARSE_ERROR);
        bed.must_refuse("an answer", IS_JSON, raw);
        let mut rig = client(bed.path(), bed.name(), features);
        rig.echo(b"honest as yet");
        rig.raw.send(&again);
        bed.must_end("one in a running session", IS_UNEXPECTED, rig);
    }
    bed.finish();
}

#[test]
fn a_session_of_version_4_stays_one() {
    let bed = bed();
    let changed: IsDue = due!(Handshake(HandshakeError::VersionChanged { agreed: 0, .. }));
    let paths = honest_paths("/q", "/b");
    for features in KINDS {
        for version in [2, 3] {
            let mut raw = negotiated(bed.path(), features);
            raw.send(&message(BY_MEMFD, version, &paths));
            bed.must_refuse("memfds of an old version", changed, raw);
            let mut rig = client(bed.path(), bed.name(), features);
            rig.echo(b"honest as yet");
            rig.raw.send(&message(SYNC, version, &[]));
            bed.must_end("a SyncEvent of an old version", changed, rig);
        }
        for (kind, payload) in [(BY_FILE, &paths[..]), (BY_MEMFD, &paths), (READY, &[]), (ACK, &[])]
        {
            let mut rig = client(bed.path(), bed.name(), features);
            rig.echo(b"honest as yet");
            rig.raw.send(&message(kind, 0, payload));
            bed.must_end("a message of the handshake", IS_UNEXPECTED, rig);
        }
    }
    bed.finish();
}

/// A client of ours that asks for this, and would fall back.
pub(super) fn asking(features: Features) -> ConfigBuilder {
    client_config()
        .protocol(ProtocolVersion::V4)
        .wakeup(wakeup(features))
        .owned_free_lists(features.owned_free_lists)
}

/// The client's first connection, which has sent its request.
fn asked(server: &RawServer, bed: &Bed) -> Raw {
    let mut raw = server.accept(bed);
    assert_eq!(raw.receive_message().0, NEGOTIATION);
    raw
}

/// The client is to give up, and not to come again.
fn must_give_up(bed: &Bed, server: &RawServer, name: &str, is_due: IsDue, raw: Raw) {
    bed.must_refuse(name, is_due, raw);
    if server.is_called() {
        bed.note(format!("{name}: it came again"));
    }
}

fn answer(protocol: &str, more: &str) -> Vec<u8> {
    let known = r#""sdk_name":"bad","sdk_version":"0""#;
    negotiation(format!(r#"{{"selected_protocol":{protocol},{known}{more}}}"#).as_bytes())
}

#[test]
fn a_refusal_is_taken_at_its_word() {
    let bed = bed();
    let long = "x".repeat(7_000);
    for features in KINDS {
        let server = RawServer::new(&bed, asking(features));
        for (code, text) in [(VERSION_NOT_SUPPORTED, "no"), (JSON_PARSE_ERROR, ""), ("", &long)] {
            let mut raw = asked(&server, &bed);
            let error = format!(r#","error":{{"code":"{code}{text}","message":"{text}"}}"#);
            raw.send(&answer("4", &error));
            // What is kept of it has a bound.
            let is_due: IsDue = |error| match error {
                Handshake(HandshakeError::Refused { code, message }) => {
                    code.len() <= 64 && message.len() <= 256
                }
                _ => false,
            };
            must_give_up(&bed, &server, code, is_due, raw);
        }
    }
    bed.finish();
}

#[test]
fn an_answer_that_is_wrong_is_an_error_and_no_reason_to_fall_back() {
    let bed = bed();
    let version: IsDue = due!(Handshake(HandshakeError::VersionNotOffered(_)));
    let feature: IsDue = due!(Handshake(HandshakeError::NotOffered(_)));
    for features in KINDS {
        let server = RawServer::new(&bed, asking(features));
        let mut cases: Vec<(Vec<u8>, IsDue)> = vec![
            (answer("3", ""), version),
            (answer("5", ""), version),
            (answer("0", ""), version),
            (answer("18446744073709551615", ""), version),
            (answer("18446744073709551616", ""), IS_JSON),
            (answer("\"4\"", ""), IS_JSON),
            (answer("[4]", ""), IS_JSON),
            (answer("4", r#","error":7"#), IS_JSON),
            (answer("4", r#","error":{}"#), IS_JSON),
            (answer("4", r#","selected_features":[7]"#), IS_JSON),
            (negotiation(&answer("4", &format!(",\"x\":{}", nested(MAX_DEPTH)))[8..]), IS_JSON),
            (header(8 + MAX_NEGOTIATION_LEN + 1, 0x7758, 0, NEGOTIATION), IS_LENGTH),
            (header(9, 0x7758, 0, NEGOTIATION), IS_LENGTH),
            (header(u32::MAX, 0x7758, 0, NEGOTIATION), IS_LENGTH),
            (message(NEGOTIATION, 3, b"{}"), IS_VERSION),
            (message(NEGOTIATION, 4, b"{}"), IS_VERSION),
            (message(EXCHANGE, 3, &[]), IS_UNEXPECTED),
            (message(EXCHANGE, 4, &[]), IS_UNEXPECTED),
            (message(READY, 0, &[]), IS_UNEXPECTED),
            (message(ACK, 0, &[]), IS_UNEXPECTED),
            (request(features), IS_JSON),
        ];
        // What the client asked for makes no difference to these.
        if features == WITH_EVENT_FDS {
            cases.extend(no_requests().into_iter().map(|json| (negotiation(&json), IS_JSON)));
        }
        let names = [
            (features.polling.is_none(), "event_queue_polling"),
            (!features.eventfd, "eventfd_wakeup"),
            (!features.owned_free_lists, "single_popper_lists"),
        ];
        for (_, name) in names.iter().filter(|(is_new, _)| *is_new) {
            // Polling is none without an interval, which is then that of the offer.
            let settings = r#""settings":{"event_queue_polling":{"polling_interval_us":100}}"#;
            let more = format!(r#","selected_features":["{name}"],{settings}"#);
            cases.push((answer("4", &more), feature));
        }
        for (bytes, is_due) in cases {
            let name = String::from_utf8_lossy(&bytes[..bytes.len().min(90)]).into_owned();
            let mut raw = asked(&server, &bed);
            raw.send(&bytes);
            must_give_up(&bed, &server, &name, is_due, raw);
        }
    }
    bed.finish();
}

#[test]
fn an_answer_in_single_bytes_with_what_is_not_known_is_one() {
    let bed = bed();
    for features in KINDS {
        let server = RawServer::new(&bed, asking(features));
        for shard in
            [r#"{"index":7,"count":3}"#, r#"{"index":-1}"#, "[]", r#"{"index":1,"count":3}"#]
        {
            let mut raw = asked(&server, &bed);
            let mut names = vec!["of_tomorrow"];
            names.extend(features.polling.map(|_| "event_queue_polling"));
            names.extend(features.eventfd.then_some("eventfd_wakeup"));
            names.extend(features.owned_free_lists.then_some("single_popper_lists"));
            let names = names.join("\",\"");
            // An interval that is left out is that of the request.
            let settings = format!(r#""settings":{{"shard":{shard},"of_tomorrow":{{}}}}"#);
            for byte in answer("4", &format!(r#","selected_features":["{names}"],{settings}"#)) {
                raw.send(&[byte]);
            }
            let mut rig = server_after_selection(raw, features);
            rig.echo(b"a session like any other");
            drop(rig);
            bed.must_see_it_gone(shard);
        }
    }
    bed.finish();
}

/// Servers close on what they do not know, whether or not they have read all of it. One that has said
/// a part of an answer knows what it answers.
#[test]
fn a_connection_that_ends_without_an_answer_is_followed_by_one_of_version_3() {
    let bed = bed();
    for features in KINDS {
        let server = RawServer::new(&bed, asking(features));
        let whole = selection(features);
        for reads in [true, false] {
            let mut raw = server.accept(&bed);
            if reads {
                assert_eq!(raw.receive_message().0, NEGOTIATION);
            }
            drop(raw);
            let mut rig = Rig::server(server.accept_next());
            rig.echo(b"a session of version 3");
            drop(rig);
            bed.must_see_it_gone("a server of version 3");
        }
        let closed: IsDue = due!(Handshake(HandshakeError::Closed { .. }));
        for said in [1, 7, 8, whole.len() - 1] {
            let mut raw = asked(&server, &bed);
            raw.send(&whole[..said]);
            raw.socket.shutdown(Shutdown::Write).unwrap();
            must_give_up(&bed, &server, "one that ends in its answer", closed, raw);
        }
        // Behind an answer it knows version 4, and so there is nothing to fall back from.
        let mut raw = asked(&server, &bed);
        raw.send(&whole);
        assert_eq!(raw.receive_message().0, BY_MEMFD);
        raw.socket.shutdown(Shutdown::Write).unwrap();
        must_give_up(&bed, &server, "one that closes later", closed, raw);
        // One that will not have version 3 either is not tried a third time.
        let raw = asked(&server, &bed);
        drop(raw);
        let mut raw = server.accept_next();
        assert_eq!(raw.receive_message().0, EXCHANGE);
        raw.socket.shutdown(Shutdown::Write).unwrap();
        must_give_up(&bed, &server, "one that closes twice", closed, raw);
        drop(server);
        // And a client that was told not to, does not.
        let server = RawServer::new(&bed, asking(features).allow_v3_fallback(false));
        let raw = asked(&server, &bed);
        raw.socket.shutdown(Shutdown::Write).unwrap();
        let unanswered: IsDue = due!(Handshake(HandshakeError::Version4Unanswered { .. }));
        must_give_up(&bed, &server, "one that closes at once", unanswered, raw);
    }
    bed.finish();
}

/// One that says nothing is asked once more, in version 3, and one that has begun to answer is not;
/// both have the time of one handshake, and not of two.
#[test]
fn a_server_that_does_not_answer_is_left_at_the_timeout() {
    let bed = bed();
    let config = asking(WITH_EVENT_FDS).handshake_timeout(Duration::from_millis(200));
    let server = RawServer::new(&bed, config);
    let is_late: IsDue = due!(Handshake(HandshakeError::Timeout(_)));
    for said in [8, 20] {
        let mut raw = asked(&server, &bed);
        raw.send(&selection(WITH_EVENT_FDS)[..said]);
        must_give_up(&bed, &server, "half an answer", is_late, raw);
    }
    let mut silent = asked(&server, &bed);
    let mut again = Raw::accept(server.listener());
    assert!(silent.is_closed_by_peer());
    assert_eq!(again.receive(8), message(EXCHANGE, 3, &[]));
    must_give_up(&bed, &server, "silence in both versions", is_late, again);
    bed.finish();
}

impl RawServer {
    /// The connection of a client that comes by itself.
    fn accept_next(&self) -> Raw {
        Raw::accept(self.listener())
    }

    /// Whether somebody waits to be accepted.
    fn is_called(&self) -> bool {
        self.listener().set_nonblocking(true).unwrap();
        match self.listener().accept() {
            Ok(_) => true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) => panic!("{error}"),
        }
    }
}
