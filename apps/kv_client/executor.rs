// SPDX-License-Identifier: MIT OR Apache-2.0
//! The life of one executor: connect, load, warm up, measure.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use futures_lite::future::or;
use glommio::channels::local_channel;
use glommio::net::TcpStream;
use hdrhistogram::Histogram;
use shmipc_glommio::{Connector, Session};

use super::address;
use super::connection::{Connection, read_buffer};
use super::counters::{Latencies, Watch, latencies};
use super::cpu::{self, Cpu};
use super::failure::Failure;
use super::options::{Options, Target};
use super::pipe::Pipe;
use super::rate::RateSchedule;
use super::session_totals::SessionTotals;
use super::ticks::Ticks;
use super::unix_socket;
use super::values::Values;
use super::work::Plan;
use super::workers::Shared;

/// How often the watchdog looks.
const TICK: Duration = Duration::from_millis(100);

/// What an executor has measured.
pub(crate) struct Measured {
    pub(crate) latencies: Histogram<u64>,
    pub(crate) started: Instant,
    pub(crate) ended: Instant,
    /// Over shared memory.
    pub(crate) totals: Option<SessionTotals>,
    /// Of the executor that has looked.
    pub(crate) cpu: Option<Cpu>,
}

/// The connections of an executor, for its watchdog.
type Watches = Rc<RefCell<Vec<Rc<Watch>>>>;

struct Executor {
    options: Options,
    number: usize,
    sessions: Vec<Session>,
    connections: Vec<Connection>,
    watches: Watches,
    latencies: Latencies,
}

/// Does the work of executor `number`.
pub(crate) async fn run(
    options: Options,
    number: usize,
    shared: &Shared,
) -> Result<Measured, Failure> {
    let patience = options.timeout;
    let mut executor = Executor {
        options,
        number,
        sessions: Vec::new(),
        connections: Vec::new(),
        watches: Rc::default(),
        latencies: Rc::new(RefCell::new(latencies())),
    };
    let watches = Rc::clone(&executor.watches);
    or(executor.work(shared), watch(&watches, patience, || shared.record_alive(number))).await
}

impl Executor {
    async fn work(&mut self, shared: &Shared) -> Result<Measured, Failure> {
        self.connect().await?;
        self.all(|_| (Plan::Load, None)).await?;
        let options = self.options.clone();
        self.all(|number| (Plan::Mixed(options.share(options.warmup, number)), None)).await?;

        // Everybody is warm; then the first executor looks at the processor times; then all go.
        shared.meet().await;
        let cpu_before = self.cpu_before().await?;
        self.latencies.borrow_mut().reset();
        shared.meet().await;
        let totals_before = SessionTotals::of(&self.sessions);
        let started = Instant::now();
        let ticks = (!options.tick.is_zero()).then(|| Ticks::start(started, options.tick));
        self.all(|number| {
            let ticks = ticks.as_ref().map(|(ticks, _)| Rc::clone(ticks));
            let schedule = options
                .rate
                .map(|rate| RateSchedule::new(started, rate, ticks, number, options.connections));
            (Plan::Mixed(options.share(options.requests, number)), schedule)
        })
        .await?;
        let ended = Instant::now();
        let totals = SessionTotals::of(&self.sessions).since(&totals_before);
        shared.meet().await;
        let cpu = match cpu_before {
            None => None,
            Some(before) => Some(self.cpu_after().await?.since(&before)),
        };
        // Nobody closes connections while the server's processor time is asked for.
        shared.meet().await;
        let is_shm = !self.sessions.is_empty();
        Ok(Measured {
            latencies: self.latencies.borrow().clone(),
            started,
            ended,
            totals: is_shm.then_some(totals),
            cpu,
        })
    }

    /// Opens the connections that are dealt to this executor.
    async fn connect(&mut self) -> Result<(), Failure> {
        let values = Rc::new(Values::new(self.options.seed, self.options.value));
        let buffer = read_buffer();
        let mine = (self.number..self.options.connections).step_by(self.options.threads);
        for number in mine {
            let watch = Rc::new(Watch::new(number));
            // It waits for the server, as for an answer.
            watch.outstanding.set(1);
            self.watches.borrow_mut().push(Rc::clone(&watch));
            let pipes = self.pipes().await.map_err(|source| {
                let to = self.options.target.to_string();
                Failure::Connect { connection: number, to, source }
            })?;
            watch.outstanding.set(0);
            let (values, latencies) = (Rc::clone(&values), Rc::clone(&self.latencies));
            let buffer = Rc::clone(&buffer);
            let connection =
                Connection::new(number, pipes, &self.options, values, latencies, watch, buffer);
            self.connections.push(connection);
        }
        Ok(())
    }

    /// The pipes of one connection.
    async fn pipes(&mut self) -> io::Result<Vec<Pipe>> {
        match &self.options.target {
            Target::Unix(path) => Ok(vec![Pipe::Unix(unix_socket::connect(path).await?)]),
            Target::Tcp(_, addresses) => {
                let connect = async |at| Ok(TcpStream::connect(at).await?);
                let socket = address::first_of(addresses, connect).await?;
                socket.set_nodelay(true)?;
                Ok(vec![Pipe::Tcp(socket)])
            }
            Target::Shm(path) => {
                if self.sessions.is_empty() {
                    let connector = Connector::new(self.options.config()?);
                    for shard in 0..Connector::shard_count(path)? {
                        self.sessions.push(connector.connect_shard(path, shard).await?);
                    }
                }
                let open = |session: &Session| {
                    let stream = session.open_stream()?;
                    Ok(Pipe::Shm { stream, message: None })
                };
                self.sessions.iter().map(open).collect()
            }
        }
    }

    /// Runs all connections, each with its plan and schedule. The first failure ends it.
    async fn all(
        &mut self,
        plan: impl Fn(usize) -> (Plan, Option<RateSchedule>),
    ) -> Result<(), Failure> {
        let (sender, receiver) = local_channel::new_unbounded();
        let sender = Rc::new(sender);
        let mut tasks = Vec::new();
        for mut connection in self.connections.drain(..) {
            let (plan, schedule) = plan(connection.number());
            let sender = Rc::clone(&sender);
            tasks.push(glommio::spawn_local(async move {
                let result = connection.run(plan, schedule).await;
                // Nobody listens any more when another connection has failed.
                let _ = sender.try_send(result.map(|()| connection));
            }));
        }
        drop(sender);
        while let Some(result) = receiver.recv().await {
            self.connections.push(result?);
        }
        self.connections.sort_by_key(Connection::number);
        Ok(())
    }

    /// Looks at the processor times, in the first executor only.
    async fn cpu_before(&mut self) -> Result<Option<Cpu>, Failure> {
        if self.number > 0 {
            return Ok(None);
        }
        let server = self.server_cpu().await?;
        Ok(Some(Cpu { server, client: cpu::of_client() }))
    }

    /// The same at the end. What it takes to ask is not counted as the client's.
    async fn cpu_after(&mut self) -> Result<Cpu, Failure> {
        let client = cpu::of_client();
        Ok(Cpu { client, server: self.server_cpu().await? })
    }

    async fn server_cpu(&mut self) -> Result<Option<Duration>, Failure> {
        // The first executor has the first connection.
        let Some(connection) = self.connections.first_mut() else { return Ok(None) };
        Ok(cpu::of_server(&connection.server_info().await?))
    }
}

/// Ends when a connection that waits for answers has not moved for too long.
async fn watch(
    watches: &Watches,
    patience: Duration,
    record_alive: impl Fn(),
) -> Result<Measured, Failure> {
    let mut seen: Vec<(u64, Instant)> = Vec::new();
    loop {
        glommio::timer::sleep(TICK).await;
        record_alive();
        let now = Instant::now();
        for (index, watch) in watches.borrow().iter().enumerate() {
            let (moves, outstanding) = (watch.moves.get(), watch.outstanding.get());
            if index == seen.len() {
                seen.push((moves, now));
            }
            let (last, since) = &mut seen[index];
            if *last != moves || outstanding == 0 {
                (*last, *since) = (moves, now);
            } else if now.duration_since(*since) >= patience {
                let connection = watch.connection;
                return Err(Failure::Stalled { connection, outstanding, patience });
            }
        }
    }
}
