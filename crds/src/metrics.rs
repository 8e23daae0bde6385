//! How operator and node-daemon tell Prometheus: each has one list of its metrics. They are registered from it, and nothing else can be;
//! `docs/metrics.md` is made of it.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus::core::{Collector, Desc};
use prometheus::proto::{self, LabelPair, MetricFamily, MetricType};
use prometheus::{
    Error, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

/// One metric.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Metric {
    /// Its name, with the unit (Prometheus, "Metric and label naming").
    pub name: &'static str,
    /// What it is to Prometheus.
    pub kind: Kind,
    /// What its value is measured in.
    pub unit: &'static str,
    /// What tells its series apart.
    pub labels: &'static [Label],
    /// What it says.
    pub help: &'static str,
}

/// Prometheus' types.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Only ever grows, while its program lives.
    Counter,
    /// What is so now.
    Gauge,
    /// How often which values came, with the upper bounds of its buckets.
    Histogram(&'static [f64]),
}

impl Kind {
    /// Its name in the text format.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        }
    }

    fn of_prometheus(self) -> MetricType {
        match self {
            Kind::Counter => MetricType::COUNTER,
            Kind::Gauge => MetricType::GAUGE,
            Kind::Histogram(_) => MetricType::HISTOGRAM,
        }
    }
}

/// A label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label {
    /// Its name.
    pub name: &'static str,
    /// What it may say. There is a bound in any case: each value is a series.
    pub values: Values,
}

/// Values of a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    /// These and no others.
    OneOf(&'static [&'static str]),
    /// One for each thing of a kind, in words.
    Each(&'static str),
}

/// Label: the VM's namespace.
pub const NAMESPACE: Label = Label {
    name: "namespace",
    values: Values::Each("namespace with VMs"),
};
/// Label: the VM's name.
pub const VM: Label = Label {
    name: "vm",
    values: Values::Each("VM"),
};
/// Label: the seat's name.
pub const SEAT: Label = Label {
    name: "seat",
    values: Values::Each("seat of the VM"),
};

/// What both programs tell of themselves.
pub const BUILD_INFO: Metric = Metric {
    name: "ftvm_build_info",
    kind: Kind::Gauge,
    unit: "1",
    labels: &[
        Label {
            name: "component",
            values: Values::OneOf(&["operator", "node-daemon"]),
        },
        Label {
            name: "version",
            values: Values::Each("release"),
        },
    ],
    help: "1, with the program and its version",
};

impl Metric {
    /// For a collector of one's own.
    ///
    /// # Errors
    /// If a name is none.
    pub fn described(&self) -> prometheus::Result<Desc> {
        let labels = self.labels.iter().map(|label| label.name.to_owned());
        Desc::new(
            self.name.to_owned(),
            self.help.to_owned(),
            labels.collect(),
            HashMap::new(),
        )
    }

    /// What a collector of one's own has collected of it.
    #[must_use]
    pub fn family(&self, samples: Vec<proto::Metric>) -> MetricFamily {
        let mut family = MetricFamily::default();
        family.set_name(self.name.to_owned());
        family.set_help(self.help.to_owned());
        family.set_field_type(self.kind.of_prometheus());
        family.set_metric(samples);
        family
    }

    /// Its labels with these values, in their order.
    #[must_use]
    pub fn labelled(&self, values: &[&str]) -> Vec<LabelPair> {
        let labels = self.labels.iter().zip(values);
        let pairs = labels.map(|(label, value)| {
            let mut pair = LabelPair::default();
            pair.set_name(label.name.to_owned());
            pair.set_value((*value).to_owned());
            pair
        });
        pairs.collect()
    }

    fn options(&self) -> Opts {
        Opts::new(self.name, self.help)
    }

    fn label_names(&self) -> Vec<&'static str> {
        self.labels.iter().map(|label| label.name).collect()
    }
}

/// What a program tells, made of its list.
pub struct Families {
    list: &'static [Metric],
    registry: Registry,
    made: BTreeSet<&'static str>,
}

impl Families {
    /// None of these is made yet.
    #[must_use]
    pub fn new(list: &'static [Metric]) -> Families {
        Families {
            list,
            registry: Registry::new(),
            made: BTreeSet::new(),
        }
    }

    /// What the list says of this one.
    ///
    /// # Errors
    /// If it is not in there.
    pub fn listed(&self, name: &str) -> prometheus::Result<&'static Metric> {
        let found = self.list.iter().find(|metric| metric.name == name);
        found.ok_or_else(|| Error::Msg(format!("{name} is not in the list of metrics")))
    }

    /// Any collector, if everything that it tells is as the list says.
    ///
    /// # Errors
    /// If it is not, or was made before.
    pub fn add<C: Collector + Clone + 'static>(&mut self, collector: C) -> prometheus::Result<C> {
        let mut made = Vec::new();
        for desc in collector.desc() {
            let metric = self.listed(&desc.fq_name)?;
            if desc.help != metric.help || desc.variable_labels != metric.label_names() {
                return Err(Error::Msg(format!("{} is not as the list says", metric.name)));
            }
            made.push(metric.name);
        }
        for family in collector.collect() {
            let metric = self.listed(family.name())?;
            if family.get_field_type() != metric.kind.of_prometheus() {
                return Err(Error::Msg(format!("{} is no {}", metric.name, metric.kind.name())));
            }
        }
        self.registry.register(Box::new(collector.clone()))?;
        self.made.extend(made);
        Ok(collector)
    }

    /// A counter without labels.
    ///
    /// # Errors
    /// If the list has none of this name.
    pub fn counter(&mut self, name: &str) -> prometheus::Result<IntCounter> {
        let metric = self.listed(name)?;
        self.add(IntCounter::with_opts(metric.options())?)
    }

    /// A counter with labels.
    ///
    /// # Errors
    /// If the list has none of this name.
    pub fn counters(&mut self, name: &str) -> prometheus::Result<IntCounterVec> {
        let metric = self.listed(name)?;
        self.add(IntCounterVec::new(metric.options(), &metric.label_names())?)
    }

    /// A gauge without labels.
    ///
    /// # Errors
    /// If the list has none of this name.
    pub fn gauge(&mut self, name: &str) -> prometheus::Result<IntGauge> {
        let metric = self.listed(name)?;
        self.add(IntGauge::with_opts(metric.options())?)
    }

    /// A gauge with labels.
    ///
    /// # Errors
    /// If the list has none of this name.
    pub fn gauges(&mut self, name: &str) -> prometheus::Result<IntGaugeVec> {
        let metric = self.listed(name)?;
        self.add(IntGaugeVec::new(metric.options(), &metric.label_names())?)
    }

    /// A gauge with labels whose values are no integers.
    ///
    /// # Errors
    /// If the list has none of this name.
    pub fn real_gauges(&mut self, name: &str) -> prometheus::Result<GaugeVec> {
        let metric = self.listed(name)?;
        self.add(GaugeVec::new(metric.options(), &metric.label_names())?)
    }

    /// A histogram without labels.
    ///
    /// # Errors
    /// If the list has none of this name.
    pub fn histogram(&mut self, name: &str) -> prometheus::Result<Histogram> {
        let metric = self.listed(name)?;
        let options = HistogramOpts::from(metric.options()).buckets(bounds(metric).to_vec());
        self.add(Histogram::with_opts(options)?)
    }

    /// A histogram of durations that somebody else has counted.
    ///
    /// # Errors
    /// If the list has none of this name.
    pub fn durations(&mut self, name: &str) -> prometheus::Result<Durations> {
        let metric = self.listed(name)?;
        self.add(Durations::new(metric)?)
    }

    /// All of the list are made.
    ///
    /// # Errors
    /// The first that is not.
    pub fn complete(self) -> prometheus::Result<Registry> {
        match self.list.iter().find(|metric| !self.made.contains(metric.name)) {
            None => Ok(self.registry),
            Some(Metric { name, .. }) => Err(Error::Msg(format!("{name} is in the list of metrics and not made"))),
        }
    }
}

fn bounds(metric: &Metric) -> &'static [f64] {
    match metric.kind {
        Kind::Histogram(bounds) => bounds,
        Kind::Counter | Kind::Gauge => &[],
    }
}

/// A histogram of durations, in seconds, that somebody else has counted in finer buckets.
#[derive(Clone)]
pub struct Durations {
    metric: &'static Metric,
    desc: Desc,
    samples: Arc<Mutex<Vec<proto::Metric>>>,
}

impl Durations {
    fn new(metric: &'static Metric) -> prometheus::Result<Durations> {
        Ok(Durations {
            metric,
            desc: metric.described()?,
            samples: Arc::default(),
        })
    }

    /// What was counted under these labels: durations in microseconds, how often each came, and the sum of all. It is told in the place of what
    /// was told of them before: Prometheus takes each series once.
    pub fn tell(&self, labels: &[&str], counted: &[(u64, u64)], sum: Duration) {
        let bounds = bounds(self.metric);
        let mut total = 0u64;
        let mut counts = vec![0u64; bounds.len()];
        for (microseconds, count) in counted {
            total = total.saturating_add(*count);
            let seconds = Duration::from_micros(*microseconds).as_secs_f64();
            // Of Prometheus' buckets each has what the smaller ones have, too.
            for (bound, counted) in bounds.iter().zip(&mut counts) {
                if seconds <= *bound {
                    *counted = counted.saturating_add(*count);
                }
            }
        }
        let buckets = bounds.iter().zip(counts).map(|(bound, count)| {
            let mut bucket = proto::Bucket::default();
            bucket.set_upper_bound(*bound);
            bucket.set_cumulative_count(count);
            bucket
        });
        let mut histogram = proto::Histogram::default();
        histogram.set_bucket(buckets.collect());
        histogram.set_sample_count(total);
        histogram.set_sample_sum(sum.as_secs_f64());
        let labels = self.metric.labelled(labels);
        let mut samples = self.lock();
        samples.retain(|told| told.get_label() != labels);
        let mut sample = proto::Metric::from_label(labels);
        sample.set_histogram(histogram);
        samples.push(sample);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<proto::Metric>> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collector for Durations {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        vec![self.metric.family(self.lock().clone())]
    }
}

#[cfg(test)]
mod tests {
    use prometheus::TextEncoder;

    use super::*;

    const LIST: &[Metric] = &[
        Metric {
            name: "a_total",
            kind: Kind::Counter,
            unit: "events",
            labels: &[],
            help: "What happened",
        },
        Metric {
            name: "b_seconds",
            kind: Kind::Histogram(&[0.001, 0.5]),
            unit: "seconds",
            labels: &[VM],
            help: "How long it took",
        },
    ];

    fn fault<T>(made: prometheus::Result<T>) -> String {
        made.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn the_list_is_what_is_told_and_nothing_else() {
        let mut families = Families::new(LIST);
        assert!(fault(families.counter("c_total")).contains("c_total is not in the list"));
        assert!(fault(families.gauge("a_total")).contains("a_total is no counter"));
        assert!(fault(families.counter("b_seconds")).contains("b_seconds is not as the list says"));
        assert!(fault(families.counters("b_seconds")).contains("b_seconds is no histogram"));
        let other = IntCounter::new("a_total", "Whatever happened").unwrap();
        assert!(fault(families.add(other)).contains("a_total is not as the list says"));
        families.counter("a_total").unwrap();
        assert!(!fault(families.counter("a_total")).is_empty(), "twice");
        assert!(fault(families.complete()).contains("b_seconds is in the list of metrics and not made"));
        let mut families = Families::new(LIST);
        families.counter("a_total").unwrap().inc();
        families.durations("b_seconds").unwrap();
        let told = families.complete().unwrap().gather();
        assert_eq!(told.len(), 1, "of the other one there is nothing to tell: {told:?}");
    }

    #[test]
    fn what_was_counted_in_fine_buckets_is_told_in_coarse_ones() {
        let mut families = Families::new(&LIST[1..]);
        let durations = families.durations("b_seconds").unwrap();
        durations.tell(&["web"], &[(10, 99)], Duration::ZERO);
        durations.tell(
            &["web"],
            &[(10, 2), (1_000, 1), (1_001, 4), (600_000, 8)],
            Duration::from_millis(1_500),
        );
        durations.tell(&["full"], &[(1, u64::MAX), (2, 3)], Duration::ZERO);
        let registry = families.complete().unwrap();
        let text = TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        for line in [
            "# TYPE b_seconds histogram",
            r#"b_seconds_bucket{vm="web",le="0.001"} 3"#,
            r#"b_seconds_bucket{vm="web",le="0.5"} 7"#,
            r#"b_seconds_bucket{vm="web",le="+Inf"} 15"#,
            r#"b_seconds_sum{vm="web"} 1.5"#,
            r#"b_seconds_count{vm="web"} 15"#,
            r#"b_seconds_count{vm="full"} 18446744073709552000"#,
        ] {
            assert!(text.lines().any(|told| told == line), "{line}\n{text}");
        }
        assert_eq!(text.matches("b_seconds_count{").count(), 2, "each series once: {text}");
    }
}
