//! A Unix socket, with blocking calls and on glommio.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use glommio::{LocalExecutorBuilder, Placement};

use super::payload;
use super::point::{Point, Slice, Stopwatch};

pub(crate) fn serve_blocking(path: &Path, point: Point, ready: impl FnOnce()) {
    let listener = UnixListener::bind(path).expect("a free path");
    ready();
    let threads: Vec<_> = (0..point.streams)
        .map(|_| {
            let (stream, _) = listener.accept().expect("a client");
            std::thread::spawn(move || echo_blocking(stream, point))
        })
        .collect();
    for thread in threads {
        thread.join().expect("an echo that ends");
    }
}

fn echo_blocking(mut stream: UnixStream, point: Point) {
    let mut buffer = vec![0; point.size];
    let mut seed = 0u8;
    while stream.read_exact(&mut buffer).is_ok() {
        if point.touch {
            payload::read(&buffer);
            payload::write(&mut buffer, seed);
            seed = seed.wrapping_add(1);
        }
        if stream.write_all(&buffer).is_err() {
            return;
        }
    }
}

pub(crate) fn measure_blocking(path: &Path, point: Point) -> Slice {
    let connect = || UnixStream::connect(path).expect("the server listens");
    let mut streams: Vec<_> = (0..point.streams).map(|_| connect()).collect();
    let mut buffer = vec![0; point.size];
    let mut seed = 0u8;
    let mut watch = Stopwatch::start(point.slice, 1);
    let mut next = Some(Instant::now());
    while let Some(began) = next {
        // One thread, all streams in flight at the same time, as one core would do it.
        for stream in &mut streams {
            if point.touch {
                payload::write(&mut buffer, seed);
                seed = seed.wrapping_add(1);
            }
            stream.write_all(&buffer).expect("the server reads");
        }
        for stream in &mut streams {
            stream.read_exact(&mut buffer).expect("the server answers");
            if point.touch {
                payload::read(&buffer);
            }
            next = watch.lap(began);
        }
    }
    watch.stop()
}

pub(crate) fn serve_glommio(path: &Path, point: Point, ready: impl FnOnce() + 'static) {
    let path = path.to_owned();
    run(async move {
        let listener = glommio::net::UnixListener::bind(&path).expect("a free path");
        ready();
        let mut tasks = Vec::new();
        for _ in 0..point.streams {
            let stream = listener.accept().await.expect("a client");
            tasks.push(glommio::spawn_local(echo(stream, point)));
        }
        for task in tasks {
            task.await;
        }
    });
}

async fn echo(mut stream: glommio::net::UnixStream, point: Point) {
    let mut buffer = vec![0; point.size];
    let mut seed = 0u8;
    while stream.read_exact(&mut buffer).await.is_ok() {
        if point.touch {
            payload::read(&buffer);
            payload::write(&mut buffer, seed);
            seed = seed.wrapping_add(1);
        }
        if stream.write_all(&buffer).await.is_err() {
            return;
        }
    }
}

pub(crate) fn measure_glommio(path: &Path, point: Point) -> Slice {
    let path = path.to_owned();
    run(async move {
        let watch = Rc::new(RefCell::new(Stopwatch::start(point.slice, 1)));
        let mut tasks = Vec::new();
        for _ in 0..point.streams {
            let stream = glommio::net::UnixStream::connect(&path).await;
            let stream = stream.expect("the server listens");
            tasks.push(glommio::spawn_local(ping(stream, point, Rc::clone(&watch))));
        }
        for task in tasks {
            task.await;
        }
        Rc::into_inner(watch).expect("all tasks are done").into_inner().stop()
    })
}

async fn ping(mut stream: glommio::net::UnixStream, point: Point, watch: Rc<RefCell<Stopwatch>>) {
    let mut buffer = vec![0; point.size];
    let mut seed = 0u8;
    let mut next = Some(Instant::now());
    while let Some(began) = next {
        if point.touch {
            payload::write(&mut buffer, seed);
            seed = seed.wrapping_add(1);
        }
        stream.write_all(&buffer).await.expect("the server reads");
        stream.read_exact(&mut buffer).await.expect("the server answers");
        if point.touch {
            payload::read(&buffer);
        }
        next = watch.borrow_mut().lap(began);
    }
}

fn run<T>(task: impl Future<Output = T>) -> T {
    let executor = LocalExecutorBuilder::new(Placement::Unbound).make();
    executor.expect("io_uring, and 512 KiB of locked memory").run(task)
}
