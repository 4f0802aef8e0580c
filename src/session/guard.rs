// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the handles of users on a session and on its streams share.

use std::rc::Rc;

use super::state::SessionInner;

/// Ends the session when the last handle of a user goes.
pub(crate) struct SessionGuard {
    inner: Rc<SessionInner>,
}

impl SessionGuard {
    pub(crate) fn new(inner: Rc<SessionInner>) -> Rc<Self> {
        Rc::new(Self { inner })
    }

    #[inline]
    pub(crate) fn inner(&self) -> &Rc<SessionInner> {
        &self.inner
    }
}

impl Drop for SessionGuard {
    fn drop(&mut self) {
        self.inner.end_at_last();
    }
}
