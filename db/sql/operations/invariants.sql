-- Invariants: rules that hold in every database, at any time. Each is a view in the schema `invariant`.
--
-- Such a view has a column `subject`, the ids that violate the invariant; its comment is the invariant's sentence. To
-- add or drop one, add or drop its view.

create or replace function surety.invariant_query() returns text
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select string_agg(
        format(
            'select %L as name, count(subject) as violations, min(subject) as example, %L as view_name'
            ' from invariant.%I',
            obj_description(pg_class.oid, 'pg_class'), 'invariant.' || pg_class.relname, pg_class.relname
        ),
        ' union all ' order by pg_class.relname
    )
    from pg_class
    where pg_class.relnamespace = 'invariant'::regnamespace and pg_class.relkind = 'v';
end;

comment on function surety.invariant_query() is
'The query of surety.check_invariants(), for a session that checks often: prepared, it is planned once.';

create or replace function surety.check_invariants()
returns table (name text, violations bigint, example text, view_name text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
    return query execute surety.invariant_query();
end;
$$;

comment on function surety.check_invariants() is
'Each invariant, its sentence as name, with the number of its violations (zero in a sound database), an example and the
view that lists them. Reads every row.';
