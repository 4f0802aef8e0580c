//! The crate `shmipc` on tokio, as its users would use it.

use std::os::unix::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use shmipc::Listener;
use shmipc::config::Config;
use shmipc::consts::MemMapType;
use shmipc::session::{SessionManager, SessionManagerConfig};
use shmipc::stream::Stream;
use shmipc::transport::{DefaultUnixConnect, DefaultUnixListen};

use super::payload;
use super::point::{Point, Slice, Stopwatch};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn config() -> Config {
    Config { mem_map_type: MemMapType::MemMapTypeMemFd, ..Config::default() }
}

fn address(path: &Path) -> SocketAddr {
    SocketAddr::from_pathname(path).expect("a path that is short enough")
}

pub(crate) fn serve(path: &Path, point: Point, ready: impl FnOnce()) {
    runtime().block_on(async {
        let listener = Listener::new(DefaultUnixListen, address(path), config()).await;
        let mut listener = listener.expect("a free path");
        ready();
        let mut tasks = Vec::new();
        for _ in 0..point.streams {
            let stream = listener.accept().await.expect("a client");
            tasks.push(tokio::spawn(echo(stream, point)));
        }
        for task in tasks {
            task.await.expect("an echo that ends");
        }
    });
}

async fn echo(mut stream: Stream, point: Point) {
    let mut buffer = vec![0; point.size];
    let mut seed = 0u8;
    while let Ok(bytes) = stream.read_exact_bytes(point.size).await {
        buffer.copy_from_slice(&bytes);
        drop(bytes);
        stream.release_read_and_reuse();
        if point.touch {
            payload::read(&buffer);
            payload::write(&mut buffer, seed);
            seed = seed.wrapping_add(1);
        }
        if stream.write_bytes(&buffer).is_err() || stream.flush(false).await.is_err() {
            break;
        }
    }
    let _ = stream.close().await;
}

pub(crate) fn measure(path: &Path, point: Point) -> Slice {
    runtime().block_on(async {
        let config = SessionManagerConfig::new().with_config(config()).with_session_num(1);
        let manager = SessionManager::new(config, DefaultUnixConnect, address(path)).await;
        let manager = manager.expect("the server listens");
        let watch = Arc::new(Mutex::new(Stopwatch::start(point.slice, 1)));
        let mut tasks = Vec::new();
        for _ in 0..point.streams {
            let stream = manager.get_stream().expect("a stream");
            tasks.push(tokio::spawn(ping(stream, point, Arc::clone(&watch))));
        }
        for task in tasks {
            task.await.expect("a ping that ends");
        }
        let watch = Arc::into_inner(watch).expect("all tasks are done");
        // Without closing the manager, which takes five seconds; the session goes with its runtime.
        watch.into_inner().expect("no task panicked").stop()
    })
}

async fn ping(mut stream: Stream, point: Point, watch: Arc<Mutex<Stopwatch>>) {
    let mut buffer = vec![0; point.size];
    let mut seed = 0u8;
    let mut next = Some(Instant::now());
    while let Some(began) = next {
        if point.touch {
            payload::write(&mut buffer, seed);
            seed = seed.wrapping_add(1);
        }
        stream.write_bytes(&buffer).expect("an open stream");
        stream.flush(false).await.expect("an open stream");
        let bytes = stream.read_exact_bytes(point.size).await.expect("the server answers");
        if point.touch {
            payload::read(&bytes);
        }
        drop(bytes);
        stream.release_read_and_reuse();
        next = watch.lock().expect("no task panicked").lap(began);
    }
    let _ = stream.close().await;
}
