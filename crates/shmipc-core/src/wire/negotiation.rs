// SPDX-License-Identifier: MIT OR Apache-2.0
//! What two sides of version 4 tell each other before anything else, in JSON
//! (`docs/protocol.md#negotiation`).
//!
//! The client offers versions and features, the server selects among them or refuses. Names that a
//! side does not know, it passes over: that is how features are added. So is a setting of another
//! shape than the one known here, together with its feature.
//!
//! A refusal is an answer with an error, a code for programs and words for people, and the end of
//! the connection. The codes, which stay as they are:
//!
//! | code | why | worth a retry |
//! |---|---|---|
//! | [`VERSION_NOT_SUPPORTED`] | no version is common | no |
//! | [`JSON_PARSE_ERROR`] | the request cannot be read | no |
//! | [`FULL`] | as many sessions, or as much memory, as there may be in all | yes |
//! | [`TOO_LARGE`] | the client's memory is larger than the server maps | no |
//! | [`NOT_ALLOWED`] | the user, the process or the files may not have a session | no |
//! | [`STOPPING`] | the server is about to stop | yes |
//!
//! A code that is not known is a refusal like any other, and worth a retry. Servers of this crate
//! also refuse later, when they have selected something and then find, when they look at the memory
//! for instance, that there will be no session: the same message, in place of what is due. Clients
//! of this crate understand that up to the acknowledgement; others see a message that is not due.
//!
//! Invariants: what is encoded here, decodes to the same value; what is decoded, is known to this
//! side and within its range.
//!
//! Trust: none. A negotiation is at most [16 KiB](super::MAX_NEGOTIATION_LEN) long and
//! [`MAX_DEPTH`] levels deep, and nothing of it is kept but what is known, and the first few words
//! of what is wrong with it.

use std::borrow::Cow;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};

use super::header::MAX_NEGOTIATION_LEN;
use crate::config::ProtocolVersion;
use crate::error::{self, WireError};

/// How deep arrays and objects may be nested. What is known needs three levels.
pub const MAX_DEPTH: usize = 16;

/// The code of a refusal: none of the versions that the client offers is one of the server's.
pub const VERSION_NOT_SUPPORTED: &str = error::VERSION_NOT_SUPPORTED;
/// The code of a refusal: the request is no JSON, or not that of a request.
pub const JSON_PARSE_ERROR: &str = error::JSON_PARSE_ERROR;
/// The code of a refusal: the server has as many sessions as it may have. Later there may be room.
pub const FULL: &str = error::FULL;
/// The code of a refusal: the client brings more memory than the server is willing to map.
pub const TOO_LARGE: &str = error::TOO_LARGE;
/// The code of a refusal: the client's user, its process or its files may not have a session.
pub const NOT_ALLOWED: &str = error::NOT_ALLOWED;
/// The code of a refusal: the server is about to stop. Another one may come in its place.
pub const STOPPING: &str = error::STOPPING;

const EVENT_QUEUE_POLLING: &str = "event_queue_polling";
const EVENTFD_WAKEUP: &str = "eventfd_wakeup";
const SINGLE_POPPER_LISTS: &str = "single_popper_lists";

/// The most that is kept of a refusal's code and of its words, in bytes.
const MAX_CODE_LEN: usize = 64;
const MAX_WORDS_LEN: usize = 256;

/// Features that one side offers, or the other selects.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::wire::{Features, NegotiationRequest};
///
/// let features = Features { eventfd: true, ..Features::default() };
/// let json = NegotiationRequest::offering(features).encode();
/// assert_eq!(NegotiationRequest::decode(&json)?.features, features);
/// # Ok::<(), shmipc_glommio::WireError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features {
    /// `event_queue_polling`: nobody wakes anybody; each side looks at its queue at this interval,
    /// which is a whole number of microseconds above zero. Wins over [`eventfd`](Self::eventfd).
    pub polling: Option<Duration>,
    /// `eventfd_wakeup`: wake-ups go through two eventfds, whose descriptors follow those of the
    /// memories.
    pub eventfd: bool,
    /// `single_popper_lists`: the buffer memory has every list twice, and each side takes slices
    /// from its own set only. A feature of this crate.
    pub owned_free_lists: bool,
}

/// Which shard of a server a session is with (setting `shard`). A setting of this crate.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::wire::ShardIdentity;
///
/// let shard = ShardIdentity { index: 1, count: 4 };
/// assert!(shard.is_valid());
/// assert!(!ShardIdentity { index: 4, count: 4 }.is_valid());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ShardIdentity {
    /// The number of the shard, from 0.
    pub index: u32,
    /// How many shards the server has.
    pub count: u32,
}

impl ShardIdentity {
    /// Whether a server with so many shards has this one.
    pub const fn is_valid(self) -> bool {
        self.index < self.count
    }
}

/// What a client opens with.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::wire::NegotiationRequest;
///
/// let request = NegotiationRequest::decode(
///     br#"{"supports_protocols":[4],"sdk_name":"shmipc-rs","sdk_version":"0.2.1",
///          "supports_features":["eventfd_wakeup","of_tomorrow"]}"#,
/// )?;
/// assert!(request.offers_version_4 && request.features.eventfd);
/// # Ok::<(), shmipc_glommio::WireError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NegotiationRequest {
    /// Whether version 4 is among the versions.
    pub offers_version_4: bool,
    /// The features that the client has, of those that are known here.
    pub features: Features,
}

/// How a server answers.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::wire::{Features, NegotiationResponse};
///
/// let refusal = NegotiationResponse::refusal("VERSION_NOT_SUPPORTED", "no");
/// let Ok(NegotiationResponse::Refused { code, message }) =
///     NegotiationResponse::decode(&refusal.encode(), Features::default())
/// else {
///     panic!("not a refusal");
/// };
/// assert_eq!((code.as_str(), message.as_str()), ("VERSION_NOT_SUPPORTED", "no"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NegotiationResponse {
    /// It goes on.
    Selected {
        /// The version that both speak from here on.
        protocol: u64,
        /// The features that the session has, of those that are known here.
        features: Features,
        /// Which shard this is, of a server that says so.
        shard: Option<ShardIdentity>,
    },
    /// It does not.
    Refused {
        /// Why, for programs; the first 64 bytes of it.
        code: String,
        /// Why, for people; the first 256 bytes of it.
        message: String,
    },
}

#[derive(Serialize, Deserialize)]
struct RequestJson<'a> {
    supports_protocols: Vec<u64>,
    #[serde(borrow)]
    sdk_name: Cow<'a, str>,
    #[serde(borrow)]
    sdk_version: Cow<'a, str>,
    #[serde(borrow, default)]
    supports_features: Vec<Cow<'a, str>>,
    #[serde(default)]
    settings: SettingsJson,
}

#[derive(Serialize, Deserialize)]
struct ResponseJson<'a> {
    selected_protocol: u64,
    #[serde(borrow)]
    sdk_name: Cow<'a, str>,
    #[serde(borrow)]
    sdk_version: Cow<'a, str>,
    #[serde(borrow, default)]
    selected_features: Vec<Cow<'a, str>>,
    #[serde(default)]
    settings: SettingsJson,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    error: Option<ErrorJson<'a>>,
}

#[derive(Serialize, Deserialize)]
struct ErrorJson<'a> {
    #[serde(borrow)]
    code: Cow<'a, str>,
    #[serde(borrow)]
    message: Cow<'a, str>,
}

#[derive(Default, Serialize, Deserialize)]
struct SettingsJson {
    #[serde(default, deserialize_with = "known", skip_serializing_if = "Option::is_none")]
    event_queue_polling: Option<PollingJson>,
    #[serde(default, deserialize_with = "known", skip_serializing_if = "Option::is_none")]
    shard: Option<ShardIdentity>,
}

#[derive(Serialize, Deserialize)]
struct PollingJson {
    polling_interval_us: u64,
}

/// A setting, if it has the shape that is known here.
fn known<'de, D: Deserializer<'de>, T: DeserializeOwned>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    Ok(serde_json::from_value(value).ok())
}

impl SettingsJson {
    fn of(features: Features, shard: Option<ShardIdentity>) -> Self {
        let polling = features.polling.map(|interval| PollingJson {
            // More than half a million years is not told apart.
            polling_interval_us: u64::try_from(interval.as_micros()).unwrap_or(u64::MAX),
        });
        Self { event_queue_polling: polling, shard }
    }

    fn polling_interval(&self) -> Option<Duration> {
        let interval = self.event_queue_polling.as_ref()?.polling_interval_us;
        (interval > 0).then(|| Duration::from_micros(interval))
    }
}

impl Features {
    fn names(self) -> Vec<Cow<'static, str>> {
        let all = [
            (self.polling.is_some(), EVENT_QUEUE_POLLING),
            (self.eventfd, EVENTFD_WAKEUP),
            (self.owned_free_lists, SINGLE_POPPER_LISTS),
        ];
        all.iter().filter(|(has, _)| *has).map(|&(_, name)| Cow::Borrowed(name)).collect()
    }

    /// Polling without an interval is not one of the features.
    fn of(names: &[Cow<'_, str>], interval: Option<Duration>) -> Self {
        let has = |name: &str| names.iter().any(|other| other == name);
        Self {
            polling: interval.filter(|_| has(EVENT_QUEUE_POLLING)),
            eventfd: has(EVENTFD_WAKEUP),
            owned_free_lists: has(SINGLE_POPPER_LISTS),
        }
    }

    /// A feature of these that is not among those `offered`.
    pub fn beyond(self, offered: Self) -> Option<&'static str> {
        if self.polling.is_some() && offered.polling.is_none() {
            Some(EVENT_QUEUE_POLLING)
        } else if self.eventfd && !offered.eventfd {
            Some(EVENTFD_WAKEUP)
        } else if self.owned_free_lists && !offered.owned_free_lists {
            Some(SINGLE_POPPER_LISTS)
        } else {
            None
        }
    }
}

const SDK_NAME: Cow<'static, str> = Cow::Borrowed("shmipc-glommio");
const SDK_VERSION: Cow<'static, str> = Cow::Borrowed(env!("CARGO_PKG_VERSION"));
const VERSION: u64 = ProtocolVersion::V4.as_u8() as u64;

impl NegotiationRequest {
    /// A request of version 4 with these features.
    pub const fn offering(features: Features) -> Self {
        Self { offers_version_4: true, features }
    }

    /// The JSON, for a [`Message::Negotiation`](super::Message::Negotiation).
    pub fn encode(&self) -> Vec<u8> {
        to_json(&RequestJson {
            supports_protocols: if self.offers_version_4 { vec![VERSION] } else { Vec::new() },
            sdk_name: SDK_NAME,
            sdk_version: SDK_VERSION,
            supports_features: self.features.names(),
            settings: SettingsJson::of(self.features, None),
        })
    }

    /// Reads the JSON of a request.
    ///
    /// # Errors
    /// [`WireError::Negotiation`] when it is none.
    pub fn decode(json: &[u8]) -> Result<Self, WireError> {
        let request: RequestJson<'_> = from_json(json)?;
        let interval = request.settings.polling_interval();
        Ok(Self {
            offers_version_4: request.supports_protocols.contains(&VERSION),
            features: Features::of(&request.supports_features, interval),
        })
    }
}

impl NegotiationResponse {
    /// An answer of version 4 with these features.
    pub const fn selecting(features: Features, shard: Option<ShardIdentity>) -> Self {
        Self::Selected { protocol: VERSION, features, shard }
    }

    /// A refusal.
    pub fn refusal(code: &str, message: &str) -> Self {
        Self::Refused {
            code: printable(code, MAX_CODE_LEN),
            message: printable(message, MAX_WORDS_LEN),
        }
    }

    /// The JSON, for a [`Message::Negotiation`](super::Message::Negotiation).
    pub fn encode(&self) -> Vec<u8> {
        let (selected_protocol, features, shard) = match *self {
            Self::Selected { protocol, features, shard } => (protocol, features, shard),
            Self::Refused { .. } => (0, Features::default(), None),
        };
        let error = match self {
            Self::Selected { .. } => None,
            Self::Refused { code, message } => {
                Some(ErrorJson { code: code.into(), message: message.into() })
            }
        };
        to_json(&ResponseJson {
            selected_protocol,
            sdk_name: SDK_NAME,
            sdk_version: SDK_VERSION,
            selected_features: features.names(),
            settings: SettingsJson::of(features, shard),
            error,
        })
    }

    /// Reads the JSON of an answer to a request with the features `offered`: an answer that selects
    /// polling may leave its interval out. A shard that cannot be is passed over.
    ///
    /// # Errors
    /// [`WireError::Negotiation`] when it is none.
    pub fn decode(json: &[u8], offered: Features) -> Result<Self, WireError> {
        let response: ResponseJson<'_> = from_json(json)?;
        if let Some(error) = response.error {
            return Ok(Self::refusal(&error.code, &error.message));
        }
        let interval = response.settings.polling_interval().or(offered.polling);
        Ok(Self::Selected {
            protocol: response.selected_protocol,
            features: Features::of(&response.selected_features, interval),
            shard: response.settings.shard.filter(|shard| shard.is_valid()),
        })
    }
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("numbers, and strings for keys")
}

fn from_json<'de, T: Deserialize<'de>>(json: &'de [u8]) -> Result<T, WireError> {
    // It may quote the peer.
    let wrong = |problem: String| WireError::Negotiation(printable(&problem, MAX_WORDS_LEN));
    if json.len() > MAX_NEGOTIATION_LEN as usize {
        return Err(wrong(format!("{} bytes, more than {MAX_NEGOTIATION_LEN}", json.len())));
    }
    if !is_flat(json) {
        return Err(wrong(format!("more than {MAX_DEPTH} levels deep")));
    }
    serde_json::from_slice(json).map_err(|error| wrong(error.to_string()))
}

/// Whether arrays and objects are nested no deeper than they may be. For JSON; of other bytes it
/// says something, too.
fn is_flat(json: &[u8]) -> bool {
    let (mut depth, mut in_string, mut is_escaped) = (0usize, false, false);
    for &byte in json {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if in_string => is_escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return false;
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    true
}

/// As much of the beginning of a peer's text as fits `most` bytes, without what controls terminals.
pub fn printable(text: &str, most: usize) -> String {
    let mut kept = String::new();
    for char in text.chars().map(|char| if char.is_control() { ' ' } else { char }) {
        if kept.len() + char.len_utf8() > most {
            break;
        }
        kept.push(char);
    }
    kept
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_request_is_what_the_crate_shmipc_sends_too() {
        let features = Features {
            polling: Some(Duration::from_micros(250)),
            eventfd: true,
            owned_free_lists: true,
        };
        let json = NegotiationRequest::offering(features).encode();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "supports_protocols": [4],
                "sdk_name": "shmipc-glommio",
                "sdk_version": env!("CARGO_PKG_VERSION"),
                "supports_features":
                    ["event_queue_polling", "eventfd_wakeup", "single_popper_lists"],
                "settings": {"event_queue_polling": {"polling_interval_us": 250}},
            })
        );
    }

    #[test]
    fn an_answer_carries_the_shard() {
        let shard = Some(ShardIdentity { index: 2, count: 3 });
        let response = NegotiationResponse::selecting(Features::default(), shard);
        let json = response.encode();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["settings"], serde_json::json!({"shard": {"index": 2, "count": 3}}));
        assert_eq!(json.get("error"), None);
        let of = |shard: &str| {
            let json = format!(
                r#"{{"selected_protocol":4,"sdk_name":"","sdk_version":"","settings":{{
                    "shard":{shard}}}}}"#
            );
            match NegotiationResponse::decode(json.as_bytes(), Features::default()).unwrap() {
                NegotiationResponse::Selected { shard, .. } => shard,
                refused => panic!("{refused:?}"),
            }
        };
        assert_eq!(of(r#"{"index":2,"count":3,"more":1}"#), shard);
        for other in [
            r#"{"index":3,"count":3}"#,
            r#"{"index":-1,"count":3}"#,
            r#"{"index":1,"count":4294967296}"#,
            r#"{"index":1}"#,
            "[1,2]",
            "null",
            "7",
        ] {
            assert!(of(other).is_none_or(|shard| shard.is_valid() && other == "[1,2]"), "{other}");
        }
    }

    #[test]
    fn what_is_not_known_is_passed_over() {
        let json = br#"{
            "supports_protocols": [5, 4, 18446744073709551615],
            "sdk_name": "\u0041", "sdk_version": "",
            "supports_features": ["x", "eventfd_wakeup", "event_queue_polling"], "more": [[[]]],
            "settings": {"x": {}, "event_queue_polling": {"polling_interval_us": "fast"}}
        }"#;
        let request = NegotiationRequest::decode(json).unwrap();
        assert!(request.offers_version_4);
        assert_eq!(request.features, Features { eventfd: true, ..Features::default() });
    }

    #[test]
    fn polling_takes_an_interval_above_zero() {
        let offered = |settings: &str| {
            let json = format!(
                r#"{{"supports_protocols":[4],"sdk_name":"","sdk_version":"",
                    "supports_features":["event_queue_polling"],"settings":{settings}}}"#
            );
            NegotiationRequest::decode(json.as_bytes()).unwrap().features.polling
        };
        assert_eq!(offered("{}"), None);
        let of = |interval: &str| {
            offered(&format!(r#"{{"event_queue_polling":{{"polling_interval_us":{interval}}}}}"#))
        };
        assert_eq!(of("0"), None);
        assert_eq!(of("-1"), None);
        assert_eq!(of("1.5"), None);
        assert_eq!(of("1"), Some(Duration::from_micros(1)));
        assert_eq!(of(&u64::MAX.to_string()), Some(Duration::from_micros(u64::MAX)));
    }

    #[test]
    fn an_answer_may_leave_the_interval_out() {
        let json = br#"{"selected_protocol":4,"sdk_name":"","sdk_version":"",
            "selected_features":["event_queue_polling"]}"#;
        let polling = Some(Duration::from_micros(70));
        let features = Features { polling, ..Features::default() };
        let response = NegotiationResponse::decode(json, features).unwrap();
        assert_eq!(response, NegotiationResponse::selecting(features, None));
    }

    #[test]
    fn what_is_no_negotiation_is_refused() {
        let deep = format!(
            r#"{{"supports_protocols":[4],"sdk_name":"","sdk_version":"","x":{}{}}}"#,
            "[".repeat(MAX_DEPTH),
            "]".repeat(MAX_DEPTH)
        );
        let long = vec![b' '; MAX_NEGOTIATION_LEN as usize + 1];
        let wrong: [&[u8]; 11] = [
            b"",
            b"{}",
            b"null",
            b"[4]",
            b"{\"supports_protocols\":[4],\"sdk_name\":\"\",\"sdk_version\":\"\"",
            b"{\"supports_protocols\":[4],\"sdk_name\":\"\",\"sdk_version\":\"\"} x",
            b"{\"supports_protocols\":[-4],\"sdk_name\":\"\",\"sdk_version\":\"\"}",
            b"{\"supports_protocols\":[4],\"sdk_name\":\"\xff\",\"sdk_version\":\"\"}",
            b"{\"supports_protocols\":[4],\"sdk_name\":\"\",\"sdk_version\":\"\",\"settings\":1}",
            deep.as_bytes(),
            &long,
        ];
        for json in wrong {
            let text = String::from_utf8_lossy(json);
            let refused = NegotiationRequest::decode(json);
            assert!(matches!(refused, Err(WireError::Negotiation(_))), "{text}");
            let refused = NegotiationResponse::decode(json, Features::default());
            assert!(matches!(refused, Err(WireError::Negotiation(_))), "{text}");
        }
        // Brackets in strings are no levels.
        let json = format!(
            r#"{{"supports_protocols":[4],"sdk_name":"\\\"{}","sdk_version":""}}"#,
            "[".repeat(100)
        );
        assert!(NegotiationRequest::decode(json.as_bytes()).is_ok());
    }

    #[test]
    fn a_refusal_is_kept_short() {
        let refusal = NegotiationResponse::refusal(&"ü".repeat(100), &"x".repeat(1000));
        let NegotiationResponse::Refused { code, message } = refusal else { panic!() };
        assert_eq!((code.len(), message.len()), (64, 256));
        let refusal = NegotiationResponse::refusal("a\nb", "\u{1b}[2J");
        let NegotiationResponse::Refused { code, message } = refusal else { panic!() };
        assert_eq!((code.as_str(), message.as_str()), ("a b", " [2J"));
    }

    fn any_features() -> impl Strategy<Value = Features> {
        let interval = (1u64..).prop_map(Duration::from_micros);
        (prop::option::of(interval), any::<bool>(), any::<bool>()).prop_map(
            |(polling, eventfd, owned_free_lists)| Features { polling, eventfd, owned_free_lists },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 256 }))]

        #[test]
        fn both_survive_the_way_there_and_back(
            features in any_features(),
            offers_version_4: bool,
            shard in prop::option::of((0u32..100, 1u32..100)),
            texts in (".{0,80}", ".{0,300}"),
        ) {
            let request = NegotiationRequest { offers_version_4, features };
            prop_assert_eq!(NegotiationRequest::decode(&request.encode()), Ok(request));
            let shard = shard.map(|(index, more)| ShardIdentity { index, count: index + more });
            let response = NegotiationResponse::selecting(features, shard);
            let none = Features::default();
            prop_assert_eq!(NegotiationResponse::decode(&response.encode(), none), Ok(response));
            let refusal = NegotiationResponse::refusal(&texts.0, &texts.1);
            prop_assert_eq!(NegotiationResponse::decode(&refusal.encode(), none), Ok(refusal));
        }

        #[test]
        fn no_bytes_do_harm(json in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = NegotiationRequest::decode(&json);
            let _ = NegotiationResponse::decode(&json, Features::default());
        }
    }
}
